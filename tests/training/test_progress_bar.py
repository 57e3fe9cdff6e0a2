"""The training's progress bar after a resume: the steps done before this run say nothing about the time left."""

import io
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from kohaku_delta import params
from kohaku_delta.training import trainer


def test_a_resumed_training_shows_where_it_is_and_its_own_speed(tmp_path, monkeypatch):
    clock, shown = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    shown.isatty = lambda: True  # without a terminal there is no bar
    monkeypatch.setattr(trainer, "tqdm", partial(tqdm, file=shown, mininterval=0, miniters=1, ascii=True, ncols=150))

    def run():
        for done in range(901, 905):  # 900 of 1000 steps were done before
            clock[0] += 10
            yield done, 0.5, 10.0

    loop = SimpleNamespace(
        recipe=params.load("miniature/params.yaml"),
        steps=1000,
        rank=0,
        ranks=1,
        folder=tmp_path,
        model=SimpleNamespace(device="cpu"),
        schedule={"visits": pa.chunked_array([[[1, 2]] * 1000])},
        starts=np.arange(1001),
        run=run,
    )
    assert trainer.run_steps(loop) == 904
    last = shown.getvalue().split("\r")[-1]
    assert "904/1000" in last and "[00:40<16:00, 10.00s/step" in last, last
