"""What makes modules whose parameters have shapes, but no memory and no values."""

from typing import Any

from torch.overrides import TorchFunctionMode


class WithoutInit(TorchFunctionMode):
    """Leaves out initial values; drawing them for meta tensors loads torch._dynamo (3 s, 60 MB)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls everything but what is in torch.nn.init."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
