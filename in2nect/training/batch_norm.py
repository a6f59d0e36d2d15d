"""BatchNorm over the batches of all processes (`trainer.sync_batchnorm`), also for timm's layers that norm and activate
in one: torch's own conversion, which Lightning uses, takes their activation away without a word.
"""

from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(TorchSyncBatchNorm):
    """Turns every BatchNorm of a model into one that the processes share, and back."""

    def __init__(self) -> None:
        self._originals: dict[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        self._originals = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        for name, original in self._originals.items():
            converted = model.get_submodule(name)
            for key, value in (*converted.named_parameters(recurse=False), *converted.named_buffers(recurse=False)):
                setattr(original, key, value)
            model.set_submodule(name, original)
        self._originals = {}
        return model
