"""Event files for TensorBoard: what journal and log.csv have of each step, under sd-scripts' tags where it has them.

A step is written when it is done, and numbered as sd-scripts does: 1 after the first update. A training that is resumed
begins a new file, which tells TensorBoard to forget the steps that are computed again. Nothing reads these files.
"""

from pathlib import Path
from typing import Any


class EventLog:
    """Writes event files into `folder`; the first one with the first step."""

    def __init__(self, folder: Path):
        self.folder, self.losses = folder, 0.0
        self.writer: Any = None

    def write(self, rows: list[dict[str, Any]], images_per_second: float, peak_mib: int) -> None:
        """Write the last of the journal's rows, and flush."""
        if self.writer is None:
            from tensorboardX import SummaryWriter  # only those who ask for it need to load it

            self.folder.mkdir(exist_ok=True)
            self.writer = SummaryWriter(str(self.folder), purge_step=len(rows))
            self.losses = sum(map(_mean_loss, rows[:-1]))
        row = rows[-1]
        self.losses += _mean_loss(row)
        values = {
            "loss/current": _mean_loss(row),
            "loss/average": self.losses / len(rows),  # of all steps so far
            "lr/unet": row["learning_rate_unet"],
            "lr/textencoder": row["learning_rate_text"],
            "gradient/norm": row["gradient_norm"],
            "gradient/scale": row["scale"],
            "speed/images_per_second": images_per_second,
            "memory/peak_mib": peak_mib,
        }
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, len(rows))
        self.writer.flush()


def _mean_loss(row: dict[str, Any]) -> float:
    return sum(row["losses"]) / len(row["losses"])
