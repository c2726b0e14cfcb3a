"""What the user sees of a training: its progress, and a line per epoch."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from stage.output import can_write, percent, say
from training.record import Record

LINE_SECONDS = 5


class Progress:
    """Shows the progress: a bar on a terminal; elsewhere a line every few seconds, or every `log_interval` batches."""

    def __init__(self, record: Record, log_interval: int | None, quiet: bool) -> None:
        self.record, self.log_interval, self.quiet = record, log_interval, quiet
        self.total = record.settings.epochs * record.training_images
        self.first = self.last = (time.monotonic(), *record.totals())
        self.bar = None
        if sys.stdout.isatty() and not log_interval and not quiet:
            from tqdm import tqdm  # imported only where it is used

            _, images, _ = record.totals()
            self.bar = tqdm(total=self.total, initial=images, unit=" images", unit_scale=True, file=sys.stdout)

    def update(self) -> None:
        """Show what the workers have done, when it is time; call this many times a second."""
        steps, images, loss_sum = self.record.totals()
        if self.bar is not None:
            self.on_bar(lambda bar: bar.update(images - bar.n))
        elif self.is_due(steps) and not self.quiet:
            self.print_line(steps, images, loss_sum)

    def is_due(self, steps: int) -> bool:
        """Return whether it is time for a line."""
        last_time, last_steps, _, _ = self.last
        if self.log_interval:
            return steps >= last_steps + self.log_interval
        return steps > last_steps and time.monotonic() > last_time + LINE_SECONDS

    def print_line(self, steps: int, images: int, loss_sum: float) -> None:
        """Print the images so far, the speed since the start, the loss since the last line, and the time left."""
        now = time.monotonic()
        (began, _, first_images, _), (_, _, last_images, last_loss_sum) = self.first, self.last
        self.last = now, steps, images, loss_sum
        speed = (images - first_images) / (now - began)
        loss = (loss_sum - last_loss_sum) / (images - last_images)
        left = max(0, self.total - images) / speed
        say(f"train: {images:,} of {self.total:,} images, {speed:,.0f} images/s, loss {loss:.4f}, {left:.0f} s left")

    def print_epoch(self) -> None:
        """Print the results of the last epoch."""
        epoch = self.record.history[-1]
        text = (
            f"train: epoch {epoch.epoch} of {self.record.settings.epochs}: {epoch.seconds:.1f} s, "
            f"loss {epoch.train_loss:.4f}, validation loss {epoch.validation_loss:.4f}, "
            f"validation accuracy {percent(epoch.validation_accuracy)}"
        )
        if self.bar is None and not self.quiet:
            say(text)
        self.on_bar(lambda bar: bar.write(text, file=sys.stdout))

    def close(self) -> None:
        """End the line of the bar."""
        self.on_bar(lambda bar: bar.close())

    def on_bar(self, show: Callable[[Any], object]) -> None:
        """Change the bar, if there is one and the terminal takes it now; the training does not wait for that."""
        if self.bar is not None and can_write(sys.stdout, seconds=0):
            with contextlib.suppress(OSError):  # the terminal is gone
                show(self.bar)
