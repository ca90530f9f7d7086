"""The student as an MLflow model. MLflow copies this file into the model, so it imports nothing of raydistill.

model = mlflow.pyfunc.load_model("models:/name@champion")
pictures = model.predict(["a red circle"])  # PIL images
"""

from __future__ import annotations

import inspect

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext


class Student(PythonModel):
    """Draws one picture a prompt, in the steps that its scheduler names."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch  # not where MLflow only looks at the file
        from diffusers import DiffusionPipeline  # likewise

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = DiffusionPipeline.from_pretrained(context.artifacts["pipeline"], local_files_only=True)
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, model_input: list[str]) -> list:
        """PIL images, the same for the same prompts: picture i is drawn from the noise of seed i."""
        import torch  # likewise

        takes = inspect.signature(self.pipeline.__call__).parameters
        asked = {name: False for name in ("clean_caption", "use_resolution_binning") if name in takes}  # as in training
        noise = [torch.Generator().manual_seed(number) for number in range(len(model_input))]
        steps = self.pipeline.scheduler.config.get("original_inference_steps", 1)  # students of one step have none
        return self.pipeline(
            list(model_input), num_inference_steps=steps, guidance_scale=0, generator=noise, **asked
        ).images


mlflow.models.set_model(Student())
