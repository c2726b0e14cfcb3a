"""training.png: the curves of a training."""

from stage.figures import as_png, new_figure
from stage.output import percent
from training.record import EpochRecord


def draw_curves(history: list[EpochRecord]) -> bytes:
    """Draw the losses and the validation accuracy by epoch, as a PNG."""
    from matplotlib.ticker import MaxNLocator  # imported here: it takes 0.2 s, and is needed only at the end

    figure = new_figure(9, 3.6)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.14, top=0.91)  # layout="constrained" takes twice the time
    losses, accuracy = figure.subplots(1, 2)
    epochs = [epoch.epoch for epoch in history]
    losses.plot(epochs, [epoch.train_loss for epoch in history], "o-", label="training (augmented)")
    losses.plot(epochs, [epoch.validation_loss for epoch in history], "s-", label="validation")
    losses.set(title="Loss (negative log-likelihood)", yscale="log")
    losses.legend()
    accuracy.plot(epochs, [epoch.validation_accuracy for epoch in history], "s-", color="tab:orange")
    accuracy.set(title=f"Validation accuracy: {percent(history[-1].validation_accuracy)}")
    for axes in (losses, accuracy):
        axes.set(xlabel="epoch", xlim=(0.5, len(history) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return as_png(figure)
