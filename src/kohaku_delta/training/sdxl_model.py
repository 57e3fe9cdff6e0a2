"""Invariant: the loss of a micro-batch is a function of (weights, batch): pictures → latents, captions → context, U-Net
→ ε, min-SNR loss.
"""

from typing import Literal, NamedTuple

import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.training import conditioning, diffusion
from kohaku_delta.training.batch_builder import Batch


class ConditioningForm(NamedTuple):
    """How time step and pooled output reach the U-Net: SDXL's own form, or that of the trainer that made the release.

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
    """The four parts of SDXL. `models`: unet, te1, te2, vae, all on `device`; the VAE in float32, because in fp16
    SDXL's overflows on some pictures (the release put 0 there).
    """

    def __init__(
        self,
        models: dict[str, torch.nn.Module],
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
        self.acp = diffusion.alphas_cumprod().to(device)
        self.amplitudes = diffusion.amplitudes(precision, device)
        self.set_form(form)

    def set_form(self, form: ConditioningForm) -> None:
        """Computes in this form from now on. Refuses x · Pᵀ where P is not square."""
        outputs, inputs = self.models["te2"].text_projection.weight.shape
        if form.text_projection == "transposed" and outputs != inputs:
            raise UserError(
                f"Text encoder 2 projects {inputs} numbers to {outputs}; train.text_projection: transposed needs as many as it gives. Set it to sdxl in params.yaml."
            )
        self.form = form
        self.models["unet"].time_proj.downscale_freq_shift = form.timestep_freq_shift

    def enable_gradient_checkpointing(self) -> None:
        """Layers are computed again in the backward instead of being kept."""
        for name in ("unet", "te1", "te2"):
            getattr(
                self.models[name],
                "enable_gradient_checkpointing" if name == "unet" else "gradient_checkpointing_enable",
            )()
            self.models[name].train()

    def conditions(self, ids1: torch.Tensor, ids2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context and pooled output of token ids (B, chunks, 77) each, in this model's form."""
        return conditioning.encode(
            self.models["te1"],
            self.models["te2"],
            ids1,
            ids2,
            self.end_token,
            self.form.text_projection == "transposed",
        )

    @torch.no_grad()
    def latent(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The same of one image: a micro-batch at once would take more memory than the rest of a step."""
        posterior = self.models["vae"].encode(pixels[None].float() / 127.5 - 1.0).latent_dist
        return (posterior.mean + posterior.std * noise) * self.vae_scaling

    def latents(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the VAE's posterior × its scaling factor, (B, 4, H/8, W/8); pixels uint8."""
        sample = torch.cat([self.latent(*each) for each in zip(pixels, noise, strict=True)])
        if not torch.isfinite(sample).all():
            raise UserError(
                "The base's VAE gave a latent that is not finite, in float32: its weights are damaged. Look at the base checkpoint."
            )
        return sample.to(self.precision)

    def losses(self, batch: Batch) -> torch.Tensor:
        """The weighted loss of each image, float32 (B,), with its graph. The noise is the target and stays float32;
        what the U-Net sees is rounded.
        """
        batch = batch.to(self.device)
        latents = self.latents(batch.pixels, batch.latent_noise)
        with torch.autocast(self.device, dtype=self.precision, enabled=self.precision != torch.float32):
            context, pooled = self.conditions(batch.ids1, batch.ids2)
            noisy = diffusion.add_noise(latents, batch.noise, batch.time_steps, self.amplitudes).to(self.precision)
            conditions = {
                "text_embeds": pooled,
                "time_ids": batch.time_ids,
            }  # float32: fp16 would round sizes above 2,048
            predicted = self.models["unet"](
                noisy, batch.time_steps, context, added_cond_kwargs=conditions, return_dict=False
            )[0]
        return diffusion.losses(predicted, batch.noise, diffusion.weights(batch.time_steps, self.acp, self.gamma))
