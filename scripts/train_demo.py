"""Train the two demo checkpoints, `demo-gpt2` and `demo-llama`, from a fixed seed and a corpus of our own.

    python scripts/train_demo.py                      # both models, each in its own process
    python scripts/train_demo.py --model demo-gpt2    # one of them
    python scripts/evaluate_demo.py                   # then: check them and rewrite docs/demo-models.md

The corpus comes from `demo_corpus`. Both models are written to `lenskit/demo_checkpoints/<name>/` in the
ordinary Hugging Face format, with the same byte-level BPE tokenizer, which is trained here too. A run writes
into a temporary folder beside its target and renames it at the end, so that an interrupted run leaves the
checkpoint that was there before as it was.

Both together take about 15 minutes on two CPU cores that do nothing else (each model on a core of its own, with
bfloat16 autocast), and 30 minutes were seen on two busy ones.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    WHOLE_WORDS,
    document,
    documents,
    repeated_tokens,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHECKPOINTS = Path(__file__).resolve().parent.parent / "lenskit" / "demo_checkpoints"
MODEL_NAMES = ("demo-gpt2", "demo-llama")
DURATION = "about 15 minutes on two CPU cores"

VOCAB_SIZE = 1280
CONTEXT = 256
WIDTH = 128
LAYERS = 4
HEADS = 8
KEY_VALUE_HEADS = 4
LLAMA_HEAD = 32  # the four value heads together are then as wide as the residual stream

EMBEDDING_SIZE = 0.1  # root mean square of the embeddings at the start
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run produces."""

    seed: int = 0
    steps: int = 3500
    tokens_per_step: int = 2048
    matrix_rate: float = 0.03  # of Muon, for the matrices in the blocks
    other_rate: float = 6e-3  # of AdamW, for embeddings, biases and norms
    warmup: int = 50
    weight_decay: float = 0.01
    repetition_share: float = 0.3  # of the documents; they are longer than the others
    # The length of the sequences from a share of the steps on: with short ones, attention finds the right
    # token to copy much sooner.
    stages: tuple[tuple[float, int], ...] = ((0.0, 64), (0.45, 128), (0.7, CONTEXT))

    def context(self, step: int) -> int:
        """The length of the sequences at a step."""
        return [length for start, length in self.stages if step >= start * self.steps][-1]

    def rate_factor(self, step: int) -> float:
        """The share of the peak rates at a step: linear warm-up, then a cosine down to a fiftieth."""
        progress = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------------------------------
# Tokenizer and models
# ----------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A GPT-2 style byte-level BPE tokenizer, trained on a sample of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = list(documents(seed, 20_000)) + list(WHOLE_WORDS) * 1000
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(name: str, vocab_size: int, end_token: int) -> PreTrainedModel:
    """The untrained model of that name."""
    specials = {"bos_token_id": end_token, "eos_token_id": end_token, "pad_token_id": end_token}
    if name == "demo-gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **specials,
        )  # fmt: skip
        return start_embeddings(GPT2LMHeadModel(config))
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, head_dim=LLAMA_HEAD,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True, **specials,
    )  # fmt: skip
    return start_embeddings(LlamaForCausalLM(config))


@torch.no_grad()
def start_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Start from embeddings that make it easy to attend to a fixed distance, on which all copying is built.

    Learned positions start as sinusoids. Rotary positions only tell distances through something that all
    queries and all keys have in common, so there all tokens share a direction at the start.
    """
    tokens = model.get_input_embeddings().weight
    torch.nn.init.normal_(tokens, std=EMBEDDING_SIZE)
    if isinstance(model, GPT2LMHeadModel):
        periods = torch.logspace(math.log10(math.pi), math.log10(2 * CONTEXT), WIDTH // 2)
        angles = 2 * math.pi * torch.arange(CONTEXT)[:, None] / periods
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        model.transformer.wpe.weight.copy_(EMBEDDING_SIZE * math.sqrt(2) * waves)
    else:
        tokens[:, :8] += 3 * EMBEDDING_SIZE
    return model


# ----------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------


MOST_REPEATED = 60  # the longest random sequence that is repeated


class Packer:
    """Fills sequences with documents, an end-of-text token between each two of them.

    A sequence begins with an end-of-text token, with a document at position 0, or inside a document, so that
    nothing depends on what stands before a document or on where in the context it begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.rng = random.Random(recipe.seed + 1)
        self.end = tokenizer.eos_token_id
        self.plain_tokens = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]

    def repetition(self, longest: int) -> tuple[list[int], list[int]]:
        """A repeated random sequence; its first copy cannot be predicted and is left out of the loss.

        Most are short, and those come many times: to copy from a few tokens back is what is learned first.
        """
        length = round(math.exp(self.rng.uniform(math.log(2), math.log(longest))))
        copies = max(2, min(8, 30 // length))
        tokens = repeated_tokens(self.rng, self.plain_tokens, length, copies)
        return tokens, [IGNORED] * (length + 1) + tokens[length + 1 :]

    def documents(self, count: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
        """Some documents as tokens and labels, each with an end-of-text token after it."""
        longest = min(MOST_REPEATED, context * 2 // 5)
        kinds = [self.rng.random() < self.recipe.repetition_share for _ in range(count)]
        encoded = iter(self.tokenizer([document(self.rng) for repeated in kinds if not repeated])["input_ids"])
        for repeated in kinds:
            tokens, labels = self.repetition(longest) if repeated else (next(encoded),) * 2
            yield [*tokens, self.end], [*labels, self.end]

    def sequence(self, stream: Iterator[tuple[list[int], list[int]]], context: int) -> tuple[list[int], list[int]]:
        """One packed sequence."""
        start = self.rng.random()
        tokens, labels = ([self.end], [IGNORED]) if start < 0.4 else ([], [])
        while len(tokens) < context:
            more_tokens, more_labels = next(stream)
            skipped = self.rng.randrange(len(more_tokens)) if not tokens and start > 0.85 else 0
            tokens = tokens + more_tokens[skipped:]
            labels = labels + more_labels[skipped:]
        return tokens[:context], labels[:context]

    def batch(self, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of one step, (sequences, context)."""
        size = self.recipe.tokens_per_step // context
        stream = itertools.chain.from_iterable(self.documents(200, context) for _ in itertools.count())
        rows = [self.sequence(stream, context) for _ in range(size)]
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])

    def probe(self, length: int = 20, count: int = 16) -> torch.Tensor:
        """Repeated random sequences to follow the progress with; they take nothing from the training data."""
        rng = random.Random(0)
        return torch.tensor([repeated_tokens(rng, self.plain_tokens, length) for _ in range(count)])


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def build_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW for all else."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.ndim == 2 and id(weight) not in embeddings]
    others = [weight for weight in weights if weight.ndim != 2 or id(weight) in embeddings]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def share_foretold(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """How much of the second half of repeated rows is foretold, from its second token on."""
    half = rows.shape[1] // 2
    found = model(input_ids=rows, use_cache=False).logits[:, half:-1].argmax(-1)
    return (found == rows[:, half + 1 :]).float().mean().item()


def train(model: PreTrainedModel, packer: Packer, recipe: Recipe, device: torch.device, bar: tqdm) -> None:
    """Train in place."""
    model.to(device).train()
    optimizers = build_optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate_factor) for optimizer in optimizers]
    probe = packer.probe().to(device)
    for step in range(recipe.steps):
        tokens, labels = (part.to(device) for part in packer.batch(recipe.context(step)))
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", repetitions=f"{share_foretold(model, probe):.1%}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint beside its folder, then put it in the folder's place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
        fresh, old = Path(parent) / "new", Path(parent) / "old"
        model.cpu().float().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh, save_jinja_files=False)
        for file in fresh.iterdir():
            file.chmod(0o644)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def pick_device(wanted: str) -> torch.device:
    """The device asked for, or an accelerator where there is one."""
    if wanted != "auto":
        return torch.device(wanted)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def train_one(name: str, recipe: Recipe, device: str, threads: int, row: int) -> None:
    """Make one checkpoint from nothing."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    model = build_model(name, len(tokenizer), tokenizer.eos_token_id)
    packer = Packer(tokenizer, recipe)
    with tqdm(total=recipe.steps, desc=name, position=row, mininterval=2.0) as bar:
        train(model, packer, recipe, pick_device(device), bar)
    save(model, tokenizer, CHECKPOINTS / name)
    minutes = (time.monotonic() - started) / 60
    size = sum(weight.numel() for weight in model.parameters())
    tqdm.write(f"{name}: {size:,} parameters, {recipe.steps} steps, {minutes:.1f} minutes -> {CHECKPOINTS / name}")


def train_together(names: tuple[str, ...], recipe: Recipe, device: str, threads: int) -> int:
    """Train several models at once, a process each; return how many of them failed."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=train_one, args=(name, recipe, device, threads, row)) for row, name in enumerate(names)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*MODEL_NAMES, "all"), default="all")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, help="CPU threads per model (default: the cores, shared out evenly)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: an accelerator if present)")
    options = parser.parse_args()

    names = MODEL_NAMES if options.model == "all" else (options.model,)
    recipe = Recipe(seed=options.seed, steps=options.steps)
    threads = options.threads or max(1, (os.cpu_count() or 1) // len(names))
    if len(names) > 1:
        return min(1, train_together(names, recipe, options.device, threads))
    train_one(names[0], recipe, options.device, threads, row=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
