"""FSDP2: weights, gradients and optimizer state are sharded over processes (Zhao et al. 2023).

Each block is gathered when it computes and freed afterwards; what lies outside the blocks, above
all a tied embedding, once per step. Training is as in one process, and so are the checkpoints:
whole tensors, gathered on rank 0, of which each process takes its shard when it resumes.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from pipeline.gpt import Block


class FullySharded(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with this project's checkpoints.

    Lightning's own restores the position in the data only after making the loader, and bypasses
    the checkpoint directory; so loading and saving are those of a single process here.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shards over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: the module itself gathers what its checkpoints keep."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this process's shard of every tensor."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, tensor in shares(checkpoint["state_dict"], parameters).items():
                parameters[name].copy_(tensor)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state, on rank 0."""
        return gathered(Strategy.optimizer_state(self, optimizer), keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the state, and shards tensors that have their parameter's shape."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                like = {k: parameter for k, v in state.items() if v.shape == parameter.shape}
                state.update(shares({k: state[k] for k in like}, like))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a model in place, block by block, then the rest; weights start as those of rank 0.

    The model must have its final dtypes and `requires_grad`; the mesh has one dimension.
    """
    model.to(mesh.device_type)
    for tensor in model.parameters():
        torch.distributed.broadcast(tensor.data, src=0)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def of_ranks(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The values of all ranks, in rank order."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def gather_shared(model: nn.Module) -> None:
    """Makes weights outside the blocks readable as plain tensors, until the next step ends."""
    if isinstance(model, FSDPModule):
        model.unshard()


def share_out_again(model: nn.Module) -> None:
    """Reshards what `gather_shared` or a validation has gathered; its plain tensors become void.

    Call it before keeping tensors of a model: some calls (PEFT's state dict) reshard midway.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def gathered(tree: Any, *, keep: bool) -> Any:
    """A tree with its sharded tensors gathered, on the CPU; all ranks must call this.

    Plain tensors stay as they are; without `keep`, gathered ones are empty, to save memory.
    """

    def gather(shared: DTensor) -> Tensor:
        tensor = shared.full_tensor().detach()
        return tensor.cpu() if keep else tensor.new_empty(0)

    return tree_map_only(DTensor, gather, tree)


def shares(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of whole tensors, which every rank has: `share` by name."""
    return {name: share(tensor, like.get(name)) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded; then all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This rank's shard of a whole tensor, which every rank has; all if `like` is no shard."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(like.device), mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
