"""The loss of a micro-batch, a function of (weights, batch).

pixels → VAE → latents; captions → text encoders → context; U-Net → predicted noise; min-SNR loss.
"""

from typing import Any, Literal, NamedTuple

import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.training import conditioning, diffusion
from kohaku_delta.training.batch_builder import Batch


class ConditioningForm(NamedTuple):
    """How time step and pooled output reach the U-Net: SDXL's own form, or that of the release's trainer.

    timestep_freq_shift: diffusers' `downscale_freq_shift`; the sinusoid's exponents are divided by half the width minus
    it (160 or 159). text_projection: `sdxl` projects the pooled state x to x · P, `transposed` to x · Pᵀ (P: the
    checkpoint's text_projection).
    """

    timestep_freq_shift: int = 0
    text_projection: Literal["sdxl", "transposed"] = "sdxl"

    @classmethod
    def of(cls, train: Train) -> "ConditioningForm":
        """The form that a recipe trains in."""
        return cls(train.timestep_freq_shift, train.text_projection)


SDXL = ConditioningForm()


class Sdxl:
    """The four models of SDXL: unet, te1, te2 and vae, all on `device`.

    The VAE is float32, because in fp16 SDXL's overflows on some images (the release put 0 there).
    """

    def __init__(
        self,
        models: dict[str, Any],
        end_token: int,
        vae_scaling: float,
        gamma: float,
        device: str,
        precision: torch.dtype,
        form: ConditioningForm = SDXL,
    ):
        self.models = {name: model.requires_grad_(False) for name, model in models.items()}
        self.end_token, self.vae_scaling, self.gamma = end_token, vae_scaling, gamma
        self.device, self.precision = device, precision
        self.alphas_cumprod = diffusion.alphas_cumprod().to(device)
        self.amplitudes = diffusion.amplitudes(precision, device)
        self.set_form(form)

    def set_form(self, form: ConditioningForm) -> None:
        """Use this form from now on. Raises UserError for x · Pᵀ if P is not square."""
        outputs, inputs = self.models["te2"].text_projection.weight.shape
        if form.text_projection == "transposed" and outputs != inputs:
            raise UserError(
                f"Text encoder 2's text_projection maps {inputs} numbers to {outputs}; train.text_projection: "
                "transposed needs a square one. Set it to sdxl in params.yaml."
            )
        self.form = form
        self.models["unet"].time_proj.downscale_freq_shift = form.timestep_freq_shift

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward instead of storing them; only active in train mode."""
        self.models["unet"].enable_gradient_checkpointing()
        self.models["te1"].activation_checkpointing_enable()
        self.models["te2"].activation_checkpointing_enable()
        for name in ("unet", "te1", "te2"):
            self.models[name].train()

    def conditions(self, ids1: torch.Tensor, ids2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context and pooled output of token ids, (B, chunks, 77) each, in this model's form."""
        te1, te2 = self.models["te1"], self.models["te2"]
        return conditioning.encode(te1, te2, ids1, ids2, self.end_token, self.form.text_projection == "transposed")

    @torch.no_grad()
    def latent(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """latents() of one image, (1, 4, H/8, W/8) float32: encoding all at once would take more memory than a step."""
        posterior = self.models["vae"].encode(pixels[None].float() / 127.5 - 1.0).latent_dist
        return (posterior.mean + posterior.std * noise) * self.vae_scaling

    def latents(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Samples (mean + std · noise) of the VAE's posterior × its scaling factor, (B, 4, H/8, W/8) in `precision`.

        pixels: (B, 3, H, W) uint8; noise: float32. Raises UserError if a sample is not finite.
        """
        samples = torch.cat([self.latent(*pair) for pair in zip(pixels, noise, strict=True)])
        if not torch.isfinite(samples).all():
            raise UserError(
                "The base's VAE gave a latent that is not finite, in float32: its weights are damaged. "
                "Check the base checkpoint."
            )
        return samples.to(self.precision)

    def losses(self, batch: Batch) -> torch.Tensor:
        """The weighted loss of each image, float32 (B,), with its graph.

        The noise is the target and stays float32; the U-Net's input is rounded to `precision`.
        """
        batch = batch.to(self.device)
        latents = self.latents(batch.pixels, batch.latent_noise)
        with torch.autocast(self.device, dtype=self.precision, enabled=self.precision != torch.float32):
            context, pooled = self.conditions(batch.ids1, batch.ids2)
            noisy = diffusion.add_noise(latents, batch.noise, batch.time_steps, self.amplitudes).to(self.precision)
            # time_ids stay float32: fp16 would round sizes above 2,048
            added = {"text_embeds": pooled, "time_ids": batch.time_ids}
            (predicted,) = self.models["unet"](
                noisy, batch.time_steps, context, added_cond_kwargs=added, return_dict=False
            )
        return diffusion.losses(
            predicted, batch.noise, diffusion.weights(batch.time_steps, self.alphas_cumprod, self.gamma)
        )
