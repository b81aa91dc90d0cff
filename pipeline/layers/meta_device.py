"""For modules on the meta device, whose parameters have shapes but neither memory nor values."""

from typing import Any

from torch.overrides import TorchFunctionMode


class WithoutInit(TorchFunctionMode):
    """Skips initialisation, which loads torch._dynamo for meta tensors (3 s, 60 MB)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls every function but those of torch.nn.init."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
