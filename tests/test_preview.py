"""The preview compares like with like: the same noise, the same posts, none of them trained on."""

import numpy as np
import torch
from diffusers import DDIMScheduler

from kohaku_delta.dataset import selection
from kohaku_delta.params import load
from kohaku_delta.preview import grid, sampler
from kohaku_delta.training import diffusion, visit


def test_held_out_posts_were_not_selected():
    ids, selected = np.arange(1000), np.arange(0, 1000, 2)
    chosen = selection.held_out(ids, selected, 1337, 50)
    assert len(set(chosen.tolist())) == 50 and (chosen % 2 == 1).all() and (np.diff(chosen) > 0).all()
    assert (chosen == selection.held_out(ids[::-1], selected[::-1], 1337, 50)).all()
    assert len(selection.held_out(ids, selected, 1337, 5000)) == 500


class Linear:
    """A stand-in for SDXL whose ε is a fixed multiple of x: the sampler's arithmetic is all that is left."""

    device, precision, vae_scaling, end_token = "cpu", torch.float32, 0.13025, 0
    amplitudes = diffusion.amplitudes(torch.float32)

    def __init__(self):
        self.seen = []
        self.models = {"unet": self.unet, "te1": None, "te2": None, "vae": self}

    def conditions(self, *ids):
        return None, torch.zeros(1)

    def unet(self, x, step, context, added_cond_kwargs, return_dict):
        self.seen.append(x[:1].clone())
        return (x * torch.cat([torch.full((len(x) // 2, 1, 1, 1), 0.9), torch.full((len(x) // 2, 1, 1, 1), 0.5)]),)

    def decode(self, z, return_dict):
        return (z.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1),)


def test_the_sampler_is_ddim_with_guidance(monkeypatch):
    monkeypatch.setattr(sampler.conditioning, "chunks", lambda *arguments: torch.zeros(3, 77, dtype=torch.int64))
    parameters = load("miniature/params.yaml").preview.model_copy(update={"prompts": ["circle"], "steps": 10, "guidance": 3.0})
    token = type("Token", (), {"eos_token_id": 0})
    model = Linear()
    sampler.sample(model, (token, token), parameters, 8, 225)

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    theirs.set_timesteps(10)
    x = torch.from_numpy(visit.normal((4, 16, 16), parameters.seed, 0, visit.NOISE))[None]
    for seen, time in zip(model.seen, theirs.timesteps):
        assert torch.allclose(seen, x, atol=1e-4)
        x = theirs.step((0.5 + 3.0 * 0.4) * x, time, x, eta=0.0).prev_sample
    assert len(model.seen) == 10


def test_the_grid_is_a_png_that_depends_on_its_pictures_only():
    pictures = [np.full((128, 96, 3), 40 * index, np.uint8) for index in range(3)]
    drawn = grid.draw(["circle, red body", "star", "a long prompt " * 9], pictures, pictures[::-1], 2, "held-out loss")
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert drawn == grid.draw(["circle, red body", "star", "a long prompt " * 9], pictures, pictures[::-1], 2, "held-out loss")
