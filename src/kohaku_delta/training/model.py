"""Invariant: the loss of a micro-batch is a function of (weights, batch): pictures → latents, captions → context, U-Net → ε, min-SNR loss."""

import torch

from kohaku_delta.refusal import Refusal
from kohaku_delta.training import conditioning, diffusion
from kohaku_delta.training.batch import Batch


class Sdxl:
    """The four parts of SDXL. `models`: unet, te1, te2, vae, all on `device`; the VAE in float32, because in fp16 SDXL's overflows on some pictures (the release put 0 there)."""

    def __init__(self, models: dict[str, torch.nn.Module], end_token: int, vae_scaling: float, gamma: float, device: str, precision: torch.dtype):
        self.models = {name: model.requires_grad_(False) for name, model in models.items()}
        self.end_token, self.vae_scaling, self.gamma = end_token, vae_scaling, gamma
        self.device, self.precision = device, precision
        self.acp = diffusion.alphas_cumprod().to(device)

    def checkpointed(self) -> None:
        """Layers are computed again in the backward instead of being kept."""
        for name in ("unet", "te1", "te2"):
            getattr(self.models[name], "enable_gradient_checkpointing" if name == "unet" else "gradient_checkpointing_enable")()
            self.models[name].train()

    @torch.no_grad()
    def latent(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The same of one image: a micro-batch at once would take more memory than the rest of a step."""
        posterior = self.models["vae"].encode(pixels[None].float() / 127.5 - 1.0).latent_dist
        return (posterior.mean + posterior.std * noise) * self.vae_scaling

    def latents(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the VAE's posterior × its scaling factor, (B, 4, H/8, W/8); pixels uint8."""
        sample = torch.cat([self.latent(*each) for each in zip(pixels, noise, strict=True)])
        if not torch.isfinite(sample).all():
            raise Refusal("The base's VAE gave a latent that is not finite, in float32: its weights are damaged. Look at the base checkpoint.")
        return sample.to(self.precision)

    def losses(self, batch: Batch) -> torch.Tensor:
        """The weighted loss of each image, float32 (B,), with its graph."""
        batch = batch.to(self.device)
        latents = self.latents(batch.pixels, batch.latent_noise)
        noise = batch.noise.to(self.precision)
        with torch.autocast(self.device, dtype=self.precision, enabled=self.precision != torch.float32):
            context, pooled = conditioning.encode(self.models["te1"], self.models["te2"], batch.ids1, batch.ids2, self.end_token)
            noisy = diffusion.add_noise(latents, noise, batch.time_steps, self.acp)
            conditions = {"text_embeds": pooled, "time_ids": batch.time_ids}  # float32: fp16 would round sizes above 2,048
            predicted = self.models["unet"](noisy, batch.time_steps, context, added_cond_kwargs=conditions, return_dict=False)[0]
        return diffusion.losses(predicted, noise, diffusion.weights(batch.time_steps, self.acp, self.gamma))
