"""Trains a small byte-level language model on text that every machine has: the source of Python's standard library.

    python examples/train_lm.py                     a few minutes on two CPU cores
    python examples/train_lm.py --short             under a minute
    python examples/train_lm.py --steps 2000 --dim 512 --layers 8 --dtype bf16 --compile
    python examples/train_lm.py --mixer hyena,hyena,hyena,attention     layers in turn, as in StripedHyena
    python examples/train_lm.py --mixer mamba,mamba,local_attention     as in Griffin, with Mamba's recurrence

It prints the loss beside the unigram entropy (what a model that only knows how frequent each byte is would reach), the
loss on held-out files, and a sample. The sample is generated through the mixers' states, token by token, and checked
against the whole sequence in one call; if the two disagree, or the model learned nothing, the exit status is not 0.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels.nn import make_mixer

# The name of each sequence mixer in pykernels.nn, and its options for tokens of a size.
MIXERS: dict[str, tuple[str, Callable[[int], dict[str, object]]]] = {
    "attention": ("attention", lambda dim: {"heads": dim // 32, "key_heads": dim // 64, "rotary_base": 10000.0}),
    "hyena": ("hyena", lambda dim: {}),
    "linear_attention": ("linear_attention", lambda dim: {"heads": dim // 32}),
    "local_attention": ("attention", lambda dim: {"heads": dim // 32, "key_heads": dim // 64, "rotary_base": 10000.0,
                                                  "window": (47, 0)}),
    "long_conv": ("long_conv", lambda dim: {}),
    "mamba": ("mamba", lambda dim: {}),
    "retention": ("retention", lambda dim: {}),
}
BYTES = 256


class Block(nn.Module):
    """A mixer over time, then a perceptron per token, each on a normalised residual stream."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(dim)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, state: object | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), state)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes [B, T] -> logits of the next byte [B, T, 256]."""

    def __init__(self, mixers: Sequence[str], dim: int, layers: int, max_tokens: int, backend: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, dim)
        self.blocks = nn.ModuleList()
        for _, mixer in zip(range(layers), itertools.cycle(mixers)):
            name, options = MIXERS[mixer]
            self.blocks.append(Block(make_mixer(name, dim, max_tokens, backend=backend, **options(dim)), dim))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def init_states(self, batch: int, max_tokens: int) -> list:
        return [block.mixer.init_state(batch, max_tokens) for block in self.blocks]

    def forward(self, tokens: Tensor, states: Sequence | None = None) -> Tensor:
        """With states, `tokens` continue the sequences in them."""
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if states is None else states[i])
        return self.head(self.norm(x)).float()


def load_text(limit: int = 16_000_000) -> tuple[Tensor, Tensor]:
    """The standard library's modules as bytes -> (training text, text of the held-out files: one in twenty)."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        texts[i % 20 == 10].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(parts)[:limit]), dtype=torch.uint8) for parts in texts)
    return train, held_out


def unigram_entropy(text: Tensor) -> float:
    """Nats per byte."""
    p = torch.bincount(text, minlength=BYTES).double() / text.numel()
    return float(-(p * p.clamp(min=1e-300).log()).sum())


def windows(text: Tensor, starts: Tensor, context: int, device: str) -> tuple[Tensor, Tensor]:
    """(inputs, the byte after each) [B, context], from the given places."""
    rows = text[starts[:, None] + torch.arange(context + 1)].to(device, torch.long)
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(model: nn.Module, text: Tensor, options: argparse.Namespace, precision: Callable) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = min(50, options.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.1 + 0.45 * (1 + math.cos(math.pi * i / options.steps))))
    generator = torch.Generator().manual_seed(0)
    start, every = time.perf_counter(), max(1, options.steps // 20)
    for i in range(1, options.steps + 1):
        starts = torch.randint(text.numel() - options.context - 1, (options.batch,), generator=generator)
        with precision():
            loss = loss_of(model, *windows(text, starts, options.context, options.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % every == 0 or i == options.steps:
            seconds = time.perf_counter() - start
            print(f"step {i:5}  loss {loss.item():.3f}  {i * options.batch * options.context / seconds:8.0f} bytes/s  "
                  f"{seconds:5.0f} s", flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, options: argparse.Namespace, precision: Callable) -> float:
    """Mean loss over eight batches of windows, spread evenly over the text."""
    starts = torch.linspace(0, text.numel() - options.context - 1, 8 * options.batch, dtype=torch.float64).long()
    with precision():
        losses = [loss_of(model, *windows(text, part, options.context, options.device))
                  for part in starts.split(options.batch)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, tokens: int, temperature: float,
             precision: Callable) -> tuple[Tensor, Tensor]:
    """Continues prompt [B, T] -> (all tokens [B, T + tokens], the logits each new one was drawn from [B, tokens, 256]).

    The prompt goes through the model in one call that fills the states, every new token in a step of its own.
    """
    generator = torch.Generator(prompt.device).manual_seed(0)
    with precision():
        states = model.init_states(prompt.shape[0], prompt.shape[1] + tokens)
        sequence, last, seen = [prompt], prompt, []
        for _ in range(tokens):
            logits = model(last, states)[:, -1]
            last = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            sequence.append(last)
            seen.append(logits)
    return torch.cat(sequence, dim=1), torch.stack(seen, dim=1)


@torch.no_grad()
def decode_error(model: LanguageModel, sequence: Tensor, logits: Tensor, precision: Callable) -> float:
    """How far the logits of token-by-token decoding are from those of one call, relative to the largest."""
    with precision():
        whole = model(sequence[:, :-1])[:, -logits.shape[1]:]
    return float((logits - whole).abs().max() / whole.abs().max())


def mixers(text: str) -> list[str]:
    """The names in a list with commas."""
    names = text.split(",")
    for name in names:
        if name not in MIXERS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(MIXERS)}, got {name!r}")
    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", type=mixers, default=["attention"], metavar="NAME[,NAME...]",
                        help=f"of the layers in turn: {', '.join(MIXERS)} (default attention)")
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--steps", type=positive, help="default 500, with --short 120")
    parser.add_argument("--dim", type=positive, help="a multiple of 64; default 256, with --short 128")
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--context", type=positive, default=512, help="bytes per sequence")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--backend", choices=("auto", "cpu", "triton", "cuda", "reference"), default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, fp32 parameters")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (120 if options.short else 500)
    options.dim = options.dim or (128 if options.short else 256)
    if options.dim % 64:
        parser.error(f"--dim must be a multiple of 64, got {options.dim}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(0)

    def precision() -> torch.autocast:
        return torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16")

    text, held_out = load_text()
    entropy = unigram_entropy(text)
    prompt = torch.tensor([list(b"def parse(self, text):\n    ")], device=options.device)
    new_tokens = 200
    longest = max(options.context, prompt.shape[1] + new_tokens)
    model = LanguageModel(options.mixer, options.dim, options.layers, longest, options.backend).to(options.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{','.join(options.mixer)} model of {parameters / 1e6:.1f}M parameters on {options.device}, "
          f"{options.dtype}; {text.numel() / 1e6:.1f} MB of Python, unigram entropy {entropy:.3f} nats per byte",
          flush=True)
    train(torch.compile(model) if options.compile else model, text, options, precision)
    loss = evaluate(model, held_out, options, precision)
    print(f"held-out loss {loss:.3f} nats per byte ({loss / math.log(2):.2f} bits), unigram entropy {entropy:.3f}")

    sequence, logits = generate(model, prompt, new_tokens, 0.7, precision)
    error = decode_error(model, sequence, logits, precision)
    tolerance = 5e-2 if options.dtype == "bf16" else 1e-4
    print(f"generated token by token ({error:.1e} from one call, at most {tolerance:.0e} is rounding):\n")
    print(bytes(sequence[0].tolist()).decode(errors="replace"))
    if not error <= tolerance:
        print("FAILED: decoding token by token differs from the whole sequence in one call", file=sys.stderr)
        return 1
    if not loss < entropy:
        print("FAILED: the held-out loss is not below the unigram entropy; train for longer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
