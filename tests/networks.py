"""Other networks, as a user would write them: net.py of the tree with another Net, and nothing else changed."""

import re
import textwrap
import types

import stages

ORIGINAL = (stages.TREE / "model-train/net.py").read_text()
CLASS = re.compile(r"^class Net\(nn\.Module\):\n.*?(?=^\S)", re.DOTALL | re.MULTILINE)
CONVOLUTIONS = "F.relu(F.max_pool2d({}(F.relu(F.max_pool2d(self.conv1(x), 2))), 2))"


def replaced(*edits):
    """net.py with texts replaced."""
    text = ORIGINAL
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


def written(layers, logits, forward="F.log_softmax(self.logits(x), dim=1)"):
    """net.py with a Net of these layers, a statement each, and the expressions that its two methods return."""
    new = f"""\
    class Net(nn.Module):
        def __init__(self, dropout: float = 0.5) -> None:
            super().__init__()
            {"; ".join(layers)}

        def logits(self, x: torch.Tensor) -> torch.Tensor:
            return {logits}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return {forward}


    """
    text, count = CLASS.subn(lambda match: textwrap.dedent(new), ORIGINAL)
    assert count == 1
    return text


def module(text):
    """The module that such a text makes."""
    made = types.ModuleType("net")
    exec(text, made.__dict__)
    return made


def sequential(*layers, forward="F.log_softmax(self.logits(x), dim=1)"):
    """net.py with a Net of layers in a row."""
    return written([f"self.layers = nn.Sequential({', '.join(layers)})"], "self.layers(x)", forward)


FIRST, SECOND = ("nn.Conv2d(1, 10, 5)", "nn.MaxPool2d(2)"), ("nn.Conv2d(10, 20, 5)", "nn.MaxPool2d(2)")
LAST = ("nn.Flatten()", "nn.Linear(320, 50)", "nn.ReLU()", "nn.Linear(50, 10)")
RELU = "nn.ReLU()"

# Those that can be trained.
NETWORKS = {
    "tanh": replaced(("F.relu(", "torch.tanh(")),
    "sigmoid": replaced(("F.relu(", "torch.sigmoid(")),
    "relu6": replaced(("F.relu(", "F.relu6(")),
    "average pooling": replaced(("F.max_pool2d(", "F.avg_pool2d(")),
    "layer norm": replaced(("self.fc1(x.flatten(1))", "self.fc1(F.layer_norm(x.flatten(1), (320,)))")),
    "third convolution": sequential(*FIRST, RELU, *SECOND, RELU, "nn.Conv2d(20, 20, 3, padding=1)", RELU, *LAST),
    "silu and group norm": sequential(
        *FIRST, "nn.GroupNorm(2, 10)", "nn.SiLU()", *SECOND, "nn.GroupNorm(4, 20)", "nn.SiLU()", *LAST
    ),
    "MLP": sequential("nn.Flatten()", "nn.Linear(784, 1200)", RELU, "nn.Linear(1200, 900)", RELU, "nn.Linear(900, 10)"),
    "100 tensors": sequential(*FIRST, RELU, *SECOND, RELU, *LAST[:3], *46 * ("Block(50, 50)",), LAST[-1]).replace(
        "class Net(",
        "class Block(nn.Linear):\n    def forward(self, x: torch.Tensor) -> torch.Tensor:\n"
        "        return x + 0.1 * F.relu(super().forward(x))\n\n\nclass Net(",
    ),
}
# Those that cannot, and the words that the refusal has.
BAD_NETWORKS = {
    "batch norm": (
        sequential(*FIRST, "nn.BatchNorm2d(10)", RELU, *SECOND, RELU, *LAST),
        "layers.2.running_mean nn.GroupNorm",
    ),
    "logits returned": (
        replaced(("return F.log_softmax(self.logits(x), dim=1)", "return self.logits(x)")),
        "log_softmax",
    ),
    "no logits()": (replaced(("def logits(", "def scores("), ("self.logits(x)", "self.scores(x)")), "logits"),
    "eleven outputs": (replaced(("len(DATA_SET.classes))", "11)")), "DATA_SET"),
    "a size that does not fit": (replaced(("20 * height * width", "300")), "300"),
    "no dropout parameter": (replaced(("self, dropout: float = 0.5", "self"), ("= dropout\n", "= 0.0\n")), "dropout"),
    "a layer that is not used": (
        replaced(("self.dropout = dropout", "self.spare = nn.Linear(2, 2); self.dropout = 0")),
        "",
    ),
    "weights that are not numbers": (
        replaced(("self.dropout = dropout", "self.fc2.bias.data.fill_(torch.nan); self.dropout = 0")),
        "finite",
    ),
}
