# SPDX-License-Identifier: Apache-2.0
"""How lmms-eval finds the model: what its entry point `lmms_eval.models` gives. Nothing heavy is imported for it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """The model's name in lmms-eval and where its class is, which is imported when that name is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hourllava", chat_class_path="hourllava.evaluate.lmms.HourLlava")
