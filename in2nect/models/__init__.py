"""Host networks: what In2NeCT's losses are trained on, made by name. Importing this package imports timm."""

from in2nect.models import manet, unetformer  # noqa: F401  (register their networks)
from in2nect.models.export import export_model, export_program
from in2nect.models.files import ModelDescription, load_model, read_description, save_model
from in2nect.models.gradient_checkpointing import Checkpointed
from in2nect.models.importing import ImportReport, import_state_dict
from in2nect.models.registry import (
    Representation,
    SegmentationModel,
    TrainingOutput,
    create_model,
    list_models,
    register_model,
)

__all__ = [
    "Checkpointed",
    "ImportReport",
    "ModelDescription",
    "Representation",
    "SegmentationModel",
    "TrainingOutput",
    "create_model",
    "export_model",
    "export_program",
    "import_state_dict",
    "list_models",
    "load_model",
    "read_description",
    "register_model",
    "save_model",
]
