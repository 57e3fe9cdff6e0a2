"""The release's gradient and loss: the real loop and model against a closed expression and against diffusers."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import DDPMScheduler

import tiny_sdxl
import tiny_training
from kohaku_delta import numerics
from kohaku_delta.params import load
from kohaku_delta.sdxl import model_loading
from kohaku_delta.training import batch_builder, schedule, training_context, training_loop
from kohaku_delta.training.sdxl_model import Sdxl

MINIATURE = load("miniature/params.yaml")
RECIPE = MINIATURE.model_copy(
    update={"schedule": MINIATURE.schedule.model_copy(update={"micro_batches": 8})}
)  # the expected values below are for eight


class Adapter:
    """Two weights, one per group."""

    def __init__(self):
        self.unet, self.text = (
            torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0])),
            torch.nn.Parameter(torch.tensor([1.5, 0.25])),
        )

    def trained(self):
        return [("lora_te1_a.lokr_w1", self.text), ("lora_unet_b.lokr_w1", self.unet)]

    def tensors(self):
        return {name: weight.data for name, weight in self.trained()}


class Model:
    """Image k's loss is ‖unet − k‖² · (1 + sin k) + ‖text‖² · k; a batch is a list of posts k."""

    device = "cpu"

    def __init__(self, adapter):
        self.adapter = adapter

    def losses(self, posts):
        return torch.stack(
            [
                (self.adapter.unet - k).square().sum() * (1 + math.sin(k)) + self.adapter.text.square().sum() * k
                for k in posts
            ]
        )


class Builder:
    def batch(self, posts, visits, bucket):
        return posts


class Recorder:
    """Replaces the optimizer: records each step's gradient and changes nothing."""

    def __init__(self):
        self.gradients = []

    def step(self, updates, gradient, scaler):
        self.gradients.append(gradient.double() / scaler.scale)
        return 1.0, 0.0, 0.0

    def tensors(self):
        return {}


def make_loop(tmp_path, order, **train):
    """A real loop over the schedule `order` that saves nothing, and its adapter."""
    execution = RECIPE.execution.model_copy(update={"save_every": 10**6})
    recipe = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update=train), "execution": execution})
    adapter = Adapter()
    return training_loop.TrainingLoop(
        recipe, training_context.TrainingContext(Model(adapter), adapter, Builder(), order, {}), tmp_path
    ), adapter


def run_step(loop, step):
    """One step of the loop, with the posts of its micro-batches in the order that it needs."""
    loop.step(step, iter([loop.schedule["posts"][row].as_py() for row in loop.rows(step)]))


def expected(rows, divisor):
    """∇ of the mean over two GPUs of 1/(divisor / 2) · Σ of their micro-batches' mean losses, by hand in float64.

    Text weights first, as in the loop.
    """
    unet, text = np.array([0.5, -1.0, 2.0]), np.array([1.5, 0.25])
    gpus = [np.zeros(5), np.zeros(5)]
    for row in rows:
        per_image = [np.r_[2 * text * k, 2 * (unet - k) * (1 + math.sin(k))] for k in row["posts"]]
        gpus[row["place"] % 2] += np.mean(per_image, axis=0) / (divisor / 2)
    return np.mean(gpus, axis=0)


@pytest.fixture
def order():
    """37 posts in two buckets: ten micro-batches of up to four, some ragged; the second step holds fewer than eight."""
    posts = pa.table({"post_id": np.arange(1, 38), "width": [128] * 18 + [160] * 19, "height": [128] * 18 + [96] * 19})
    return schedule.build_schedule(posts, RECIPE.schedule)[0]


@pytest.mark.parametrize(("divisor", "last"), [("full", 8), ("actual", 2)])
def test_a_step_is_the_mean_over_gpus_of_the_mean_of_micro_batches_ragged_as_full(tmp_path, order, divisor, last):
    rows = order.to_pylist()
    assert {len(row["posts"]) for row in rows} == {4, 3, 2} and [
        sum(row["step"] == step for row in rows) for step in (0, 1)
    ] == [8, 2]
    loop, _ = make_loop(tmp_path, order, last_step_divisor=divisor)
    loop.optimizer = Recorder()
    for step in range(2):
        run_step(loop, step)
    for step, number in ((0, 8), (1, last)):
        of_step = [row for row in rows if row["step"] == step]
        assert np.allclose(loop.optimizer.gradients[step].numpy(), expected(of_step, number), rtol=1e-5)
    first = [row for row in rows if row["step"] == 0]
    weighted_by_image = np.mean([expected([row | {"posts": [k]}], 1) for row in first for k in row["posts"]], axis=0)
    assert not np.allclose(expected(first, 8), weighted_by_image, rtol=1e-2), (
        "the values must show whether a ragged micro-batch counts as a full one"
    )


def test_the_journal_shows_the_warm_up_of_both_groups_from_rate_0(tmp_path, order):
    posts = pa.table({"post_id": np.arange(1, 161), "width": [128] * 160, "height": [128] * 160})
    rows = schedule.build_schedule(posts, RECIPE.schedule)[0]
    loop, adapter = make_loop(tmp_path, rows, warmup_steps=3, learning_rate_unet=4e-5, learning_rate_text=1e-5)
    before = {name: weight.clone() for name, weight in adapter.tensors().items()}
    run_step(loop, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.tensors().items()), "the first rate is 0"
    for step in range(1, 5):
        run_step(loop, step)
    rows = loop.journal.rows
    assert [row["learning_rate_unet"] for row in rows] == pytest.approx([0, 4e-5 / 3, 8e-5 / 3, 4e-5, 4e-5], rel=1e-12)
    assert [row["learning_rate_text"] for row in rows] == pytest.approx([0, 1e-5 / 3, 2e-5 / 3, 1e-5, 1e-5], rel=1e-12)


def test_a_step_that_overflows_is_skipped_and_does_not_advance_the_warm_up(tmp_path):
    """accelerate's scheduler does not advance if the optimizer step was skipped: the first real update has rate 0."""
    posts = pa.table({"post_id": np.arange(1, 161), "width": [128] * 160, "height": [128] * 160})
    loop, adapter = make_loop(
        tmp_path,
        schedule.build_schedule(posts, RECIPE.schedule)[0],
        precision="float16",
        warmup_steps=2,
        learning_rate_unet=4e-5,
    )
    loop.scaler.scale = 1e39  # the first scaled loss is infinite in float32
    before = {name: weight.clone() for name, weight in adapter.tensors().items()}
    run_step(loop, 0)
    assert not math.isfinite(loop.journal.rows[0]["gradient_norm"]) and loop.scaler.scale == 1e39 / 2
    loop.scaler.scale = 1024.0
    run_step(loop, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.tensors().items()), (
        "the first update's rate is 0"
    )
    for step in range(2, 5):
        run_step(loop, step)
    assert [row["learning_rate_unet"] for row in loop.journal.rows] == pytest.approx(
        [0, 0, 2e-5, 4e-5, 4e-5], rel=1e-12
    )


def test_a_stop_requested_after_the_exchange_stops_all_ranks_after_the_next_step(tmp_path, order):
    loop, _ = make_loop(tmp_path, order)
    loop.optimizer = Recorder()
    update = Recorder.step

    def step_with_signal(*arguments):
        loop.stop_requested = True  # a signal between the exchange and the step's end
        return update(loop.optimizer, *arguments)

    loop.optimizer.step = step_with_signal
    run_step(loop, 0)
    assert not loop.stopping, (
        "the other ranks do not know yet: they go on to the next step, and would wait there for this rank"
    )
    run_step(loop, 1)
    assert loop.stopping


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    numerics.enforce()
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    tiny_sdxl.write(path, 1)
    return Sdxl(model_loading.load(path, tiny_sdxl.MODEL, dtype=torch.float32), 999, 0.13025, 5.0, "cpu", torch.float32)


def micro_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((2, 3, 77), 999)
    ids[:, :, 0] = 998
    ids[:, 0, 1:9] = torch.arange(1, 17).reshape(2, 8)
    normal = [torch.randn(2, 4, 12, 16, generator=generator) for _ in range(2)]
    time_ids = torch.tensor([[1500.0, 1000.0, 0.0, 10.0, 96.0, 128.0], [3001.0, 4097.0, 7.0, 0.0, 96.0, 128.0]])
    return batch_builder.Batch(
        torch.randint(0, 256, (2, 3, 96, 128), generator=generator, dtype=torch.uint8),
        ids,
        ids.clone(),
        time_ids,
        *normal,
        torch.tensor([17, 800]),
    )


def test_latents_are_a_sample_of_the_posterior_times_0_13025(sdxl):
    """diffusers samples with the same numbers; the formula is mean + exp(½ log variance) · ε."""
    batch = micro_batch()
    posterior = sdxl.models["vae"].encode(batch.pixels.float() / 127.5 - 1).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(11))
    latents = sdxl.latents(batch.pixels, torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(11)))
    assert torch.allclose(latents, drawn * 0.13025, rtol=1e-6, atol=1e-8)
    mean, log_variance = posterior.parameters.chunk(2, dim=1)
    assert torch.allclose(
        sdxl.latents(batch.pixels, batch.latent_noise),
        (mean + (0.5 * log_variance).exp() * batch.latent_noise) * 0.13025,
        rtol=1e-5,
        atol=1e-7,
    )


def test_the_unet_gets_noisy_latents_and_six_sinusoids_and_the_loss_is_min_snr(sdxl):
    batch, captured = micro_batch(), {}
    hooks = [
        sdxl.models["unet"].conv_in.register_forward_hook(lambda _, inputs, __: captured.update(noisy=inputs[0])),
        sdxl.models["unet"].add_embedding.register_forward_hook(
            lambda _, inputs, __: captured.update(conditions=inputs[0])
        ),
        sdxl.models["unet"].register_forward_hook(lambda _, __, out: captured.update(predicted=out[0])),
    ]
    losses = sdxl.losses(batch)
    for hook in hooks:
        hook.remove()
    theirs = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
    )
    latents = sdxl.models["vae"].encode(batch.pixels.float() / 127.5 - 1).latent_dist
    assert torch.allclose(
        captured["noisy"],
        theirs.add_noise((latents.mean + latents.std * batch.latent_noise) * 0.13025, batch.noise, batch.time_steps),
        atol=1e-6,
    )

    frequencies = 10000.0 ** (-np.arange(128) / 128)
    for image, numbers in enumerate(batch.time_ids.tolist()):
        waves = np.concatenate(
            [np.r_[np.cos(number * frequencies), np.sin(number * frequencies)] for number in numbers]
        )
        assert np.allclose(
            captured["conditions"][image, 64:].detach().numpy(), waves, atol=2e-3
        )  # float32 angles of up to 4,097
    te2 = sdxl.models["te2"](batch.ids2[:, 0]).text_embeds
    assert torch.allclose(captured["conditions"][:, :64], te2, atol=1e-5)

    acp = theirs.alphas_cumprod.double()[batch.time_steps]
    weight = torch.minimum(5 * (1 - acp) / acp, torch.ones(2, dtype=torch.double))
    mean_square = (captured["predicted"].double() - batch.noise.double()).square().sum(dim=(1, 2, 3)) / (4 * 12 * 16)
    assert losses.dtype == torch.float32 and torch.allclose(losses.double(), mean_square * weight, rtol=1e-5)
    assert weight[0] < 0.1 and weight[1] == 1


@pytest.mark.ci
def test_the_journals_losses_and_norm_are_those_of_one_graph(tmp_path):
    """The first step as one expression: Σ of the micro-batches' mean losses / 4, differentiated at once."""
    from kohaku_delta.training import run_inputs
    from kohaku_delta.training.lokr import LokrAdapter

    folder = tiny_training.write(tmp_path / "training", 8)
    assert tiny_training.run(folder).returncode == 0
    recipe, build = load(folder / "params.yaml"), folder / "build"
    numerics.enforce()
    files = {"inputs": build / "inputs.json", "tokenizer": None, "tokenizer_2": None, "tars": None}
    _, tokenizers = run_inputs.load_tokenizers(files)
    model = training_context.load_sdxl(recipe, build / "delta-base.safetensors", tokenizers, "cpu", torch.float32)
    adapter = LokrAdapter(model.models, recipe.lokr, torch.float32)
    posts, captions = (tiny_training.parquet.read(build / f"{name}.parquet") for name in ("posts", "captions"))
    source = batch_builder.BatchBuilder(
        posts,
        captions,
        next(iter(run_inputs.tar_paths(files).values())).parent,
        tokenizers,
        recipe.train,
        recipe.caption.separator,
        8,
    )
    rows = [row for row in tiny_training.parquet.read(build / "schedule.parquet").to_pylist() if row["step"] == 0]
    means = torch.stack(
        [model.losses(source.batch(row["posts"], row["visits"], (row["width"], row["height"]))).mean() for row in rows]
    )
    (means.sum() / 4).backward()
    norm = math.sqrt(sum(weight.grad.double().square().sum().item() for _, weight in adapter.trained()))
    journal = tiny_training.journal(folder).to_pylist()[0]
    assert journal["losses"] == pytest.approx(means.tolist(), rel=1e-5) and journal["gradient_norm"] == pytest.approx(
        norm, rel=1e-4
    )
