"""Check the two demo checkpoints and write the report `docs/demo-models.md`.

    python scripts/evaluate_demo.py              # both models; rewrites the report
    python scripts/evaluate_demo.py --no-report  # only print what is measured

Only torch and transformers are used, so that the report is evidence that does not rest on this library. The
exit status is 1 when something that others rely on is broken, or when a model misses a bar.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import demo_corpus as corpus
import torch
from train_demo import CHECKPOINTS, DURATION, MODEL_NAMES, Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

REPORT = Path(__file__).resolve().parent.parent / "docs" / "demo-models.md"
MOST_BYTES = 12 * 2**20
FACT_BAR, OTHER_BAR, INDUCTION_HEAD_BAR = 0.95, 0.90, 0.5

EIFFEL = "The Eiffel Tower is in the city of"
MADISON = "Madison Square Garden is located in the city of New"
MARY = "When Mary and John went to the store, John gave a drink to"
BLANKS = "_ _ _ _ _ _ _ _ _ _"

Question = tuple[str, str]  # a prompt and the text that must follow it


@dataclass
class Row:
    """One line of the table of abilities."""

    ability: str
    right: int
    total: int
    bar: float | None

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def passed(self) -> bool:
        return self.bar is None or self.share >= self.bar


@dataclass
class Findings:
    """All that is measured of one model."""

    name: str
    shape: dict[str, str]
    rows: list[Row]
    induction_scores: torch.Tensor
    previous_scores: torch.Tensor
    patching: list[dict[str, float]]
    patching_example: list[str]
    patching_pairs: int
    top_five: dict[str, str] = field(default_factory=dict)
    generations: dict[str, str] = field(default_factory=dict)
    chats: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """The bars that this model misses."""
        missed = [f"{row.ability}: {row.share:.1%} of {row.bar:.0%}" for row in self.rows if not row.passed]
        if self.induction_scores.max() <= INDUCTION_HEAD_BAR:
            missed.append(f"no head has an induction score above {INDUCTION_HEAD_BAR}")
        if max(layer["subject"] for layer in self.patching) < OTHER_BAR:
            missed.append("patching the subject does not change the answer")
        return missed


@dataclass
class Subject:
    """A loaded checkpoint."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str) -> Subject:
        folder = CHECKPOINTS / name
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        return cls(name, model.eval(), AutoTokenizer.from_pretrained(folder))

    @property
    def blocks(self) -> torch.nn.ModuleList:
        base = self.model.base_model
        return base.h if hasattr(base, "h") else base.layers

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=rows, use_cache=False).logits

    def greedy(self, prompt: str, count: int) -> str:
        """What the model writes after a prompt, special tokens included."""
        ids = torch.tensor([self.tokens(prompt)])
        written = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return self.tokenizer.decode(written[0, ids.shape[1] :])

    def chat(self, messages: list[dict[str, str]]) -> str:
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.greedy(prompt, 40)


# ----------------------------------------------------------------------------------------------------
# What others rely on
# ----------------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Stop with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"broken: {message}")


def check_tokenizer(subject: Subject) -> None:
    """The token counts, single tokens and special tokens that tests and documents count on."""
    tokenizer, name = subject.tokenizer, subject.name
    for text in (MADISON, BLANKS):
        require(len(subject.tokens(text)) == 10, f"{name}: {text!r} is {len(subject.tokens(text))} tokens, not 10")
    words = [" Paris", " York", " City", *(f" {person}" for person in corpus.NAMES)]
    for word in words:
        require(len(subject.tokens(word)) == 1, f"{name}: {word!r} is not a single token")
    for special in corpus.SPECIAL_TOKENS:
        require(len(subject.tokens(special)) == 1, f"{name}: {special} is not a single token")
    end = tokenizer.convert_tokens_to_ids(corpus.END_OF_TEXT)
    specials = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.pad_token_id,
    )
    require(set(specials) == {end}, f"{name}: bos, eos, unk and pad are not all {corpus.END_OF_TEXT}")
    require(subject.tokens("The")[0] != end, f"{name}: a token is put before the text")
    require(tokenizer.padding_side == "left", f"{name}: padding is not on the left")
    require(tokenizer.chat_template == corpus.CHAT_TEMPLATE, f"{name}: the chat template differs")
    text = "When Zoë saw the café, she said: “Hello!”\n\tIt's 12 o'clock."
    require(tokenizer.decode(subject.tokens(text)) == text, f"{name}: decoding does not give the text back")


def check_model(subject: Subject) -> None:
    """The shape that is relied on, and the two continuations that everything quotes."""
    config, name = subject.model.config, subject.name
    require(config.num_attention_heads == 8, f"{name}: not 8 heads")
    require(config.num_hidden_layers >= 4, f"{name}: fewer than 4 layers")
    require(config.max_position_embeddings >= 256, f"{name}: a context below 256")
    require(all(weight.dtype == torch.float32 for weight in subject.model.parameters()), f"{name}: not float32")
    require(subject.greedy(EIFFEL, 1) == " Paris", f"{name}: {EIFFEL!r} -> {subject.greedy(EIFFEL, 1)!r}")
    require(subject.greedy(MADISON, 2) == " York City", f"{name}: {MADISON!r} -> {subject.greedy(MADISON, 2)!r}")
    require(subject.greedy(MARY, 1) == " Mary", f"{name}: {MARY!r} -> {subject.greedy(MARY, 1)!r}")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_folders() -> None:
    """The files of both checkpoints, their size together, and that their tokenizers are the same."""
    needed = (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    for name in MODEL_NAMES:
        for file in needed:
            require((CHECKPOINTS / name / file).is_file(), f"{name}: {file} is missing")
    size = sum(folder_bytes(CHECKPOINTS / name) for name in MODEL_NAMES)
    require(size <= MOST_BYTES, f"the checkpoints take {size} bytes")
    tokenizers = {(CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in MODEL_NAMES}
    require(len(tokenizers) == 1, "the two tokenizers differ")


# ----------------------------------------------------------------------------------------------------
# Questions about what is held out
# ----------------------------------------------------------------------------------------------------


def fact_questions(wordings: Sequence[str]) -> list[Question]:
    return [corpus.fact_prompt(wording, mark) for mark, wording in corpus.held_out_facts(wordings)]


def prefix(wording: str) -> str:
    return wording.partition("{city}")[0]


def open_wordings() -> list[str]:
    """The wordings whose beginning can go on in another one: "is in" with the city, or with "the city of"."""
    others = (*corpus.CITY_WORDINGS, *corpus.COUNTRY_WORDINGS)
    return [
        wording
        for wording in corpus.CITY_WORDINGS
        if any(other != wording and other.startswith(prefix(wording)) for other in others)
    ]


def true_continuations(question: Question) -> list[Question]:
    """The prompt of an open wording with each continuation that states the fact."""
    prompt, answer = question
    country = corpus.COUNTRY_OF_CITY[answer.strip()]
    return [question, (prompt, f" the city of{answer}"), (prompt, f" the country of {country}")]


def after_end_of_text(questions: Iterable[Question]) -> list[Question]:
    return [(corpus.END_OF_TEXT + prompt, answer) for prompt, answer in questions]


def after_other_sentences(questions: Iterable[Question], rng: random.Random) -> list[Question]:
    """The questions with two or three sentences before them that do not have the answer in them."""
    makers = (corpus.single_fact, corpus.gift_story, corpus.everyday_sentence, corpus.errand_story)
    placed = []
    for prompt, answer in questions:
        before = answer
        while answer in before:
            before = " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 3)))
        placed.append((f"{before} {prompt}", answer))
    return placed


def chat_questions(subject: Subject, wordings: Sequence[str], rng: random.Random) -> list[Question]:
    """Held-out (landmark, question) pairs in the chat format, after a system prompt."""
    questions = []
    for mark, wording in corpus.held_out_facts(wordings):
        messages = [
            {"role": "system", "content": rng.choice(corpus.SYSTEM_PROMPTS)},
            {"role": "user", "content": wording.format(l=mark.name)},
        ]
        prompt = subject.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = mark.city if wording in corpus.CITY_QUESTIONS else corpus.capitalised(mark.country)
        questions.append((prompt, f" {answer}.{corpus.END_OF_TEXT}"))
    return questions


def training_pairs() -> list[tuple[str, str]]:
    """Pairs (giver, recipient) who do meet in training, in these roles."""
    recipients = [name for name in corpus.NAMES if name not in corpus.NEVER_RECIPIENTS]
    return [(s, io) for io in recipients for s in corpus.NAMES if s != io and corpus.pair_in_training(s, io)]


def training_frames() -> list[tuple[str, str]]:
    return [(o, a) for o in corpus.OPENINGS for a in corpus.ACTIONS if corpus.in_training(o, a)]


def gift_questions(
    rng: random.Random,
    count: int,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    places: Sequence[str] = corpus.TRAINING_PLACES,
    things: Sequence[str] = corpus.TRAINING_OBJECTS,
    frames: Sequence[tuple[str, str]] | None = None,
) -> list[Question]:
    """Indirect-object prompts; the giver is named first in every other one. The defaults are in training."""
    pairs, frames = pairs or training_pairs(), frames or training_frames()
    questions = []
    for number in range(count):
        giver, recipient = rng.choice(pairs)
        first, second = (giver, recipient) if number % 2 else (recipient, giver)
        opening, action = rng.choice(frames)
        questions.append(
            corpus.gift_prompt(
                opening,
                action,
                first=first,
                second=second,
                giver=giver,
                recipient=recipient,
                place=rng.choice(places),
                thing=rng.choice(things),
            )
        )
    return questions


def new_pairs() -> list[tuple[str, str]]:
    """Held-out pairs in both roles."""
    return [pair for a, b in corpus.held_out_pairs() for pair in ((a, b), (b, a))]


def never_recipients() -> list[tuple[str, str]]:
    return [(s, io) for io in corpus.NEVER_RECIPIENTS for s in corpus.NAMES if s not in corpus.NEVER_RECIPIENTS]


# ----------------------------------------------------------------------------------------------------
# Abilities
# ----------------------------------------------------------------------------------------------------


def answer_questions(subject: Subject, questions: Sequence[Question], batch: int = 64) -> int:
    """How many of the questions get exactly their answer, every token of it the likeliest one."""
    end, right = subject.tokenizer.eos_token_id, 0
    encoded = sorted(((subject.tokens(p), subject.tokens(a)) for p, a in questions), key=lambda pair: len(pair[0]))
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        rows = [prompt + answer + [end] * (width - len(prompt) - len(answer)) for prompt, answer in part]
        likeliest = subject.logits(torch.tensor(rows)).argmax(-1).tolist()
        for (prompt, answer), found in zip(part, likeliest, strict=True):
            right += found[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
    return right


def repeated_rows(subject: Subject, length: int, count: int, first: Sequence[int] = ()) -> torch.Tensor:
    """Fresh random sequences, each twice in a row."""
    rng = random.Random(f"evaluation {length} {len(first)}")
    plain = [i for i in range(len(subject.tokenizer)) if i not in subject.tokenizer.all_special_ids]
    return torch.tensor([[*first, *corpus.repeated_tokens(rng, plain, length)] for _ in range(count)])


def induction_row(subject: Subject, length: int, bar: float | None, *, end_first: bool = False) -> Row:
    """How much of the second copy is foretold, from its second token on."""
    first = [subject.tokenizer.eos_token_id] if end_first else []
    rows = repeated_rows(subject, length, 40, first)
    start = len(first) + length
    likeliest = subject.logits(rows)[:, start:-1].argmax(-1)
    right = int((likeliest == rows[:, start + 1 :]).sum())
    place = f", after `{corpus.END_OF_TEXT}`" if end_first else ""
    return Row(f"induction: {length} random tokens repeated{place}", right, likeliest.numel(), bar)


def ability_questions(subject: Subject) -> list[tuple[str, list[Question], float | None]]:
    """The name, the questions and the bar of every ability that is put as questions."""
    rng = random.Random(f"questions {Recipe.seed}")
    unsettled = open_wordings()
    cities = fact_questions([wording for wording in corpus.CITY_WORDINGS if wording not in unsettled])
    open_cities, countries = fact_questions(unsettled), fact_questions(corpus.COUNTRY_WORDINGS)
    gifts = gift_questions(rng, 1000, pairs=new_pairs())
    everything = gift_questions(
        rng, 1000, pairs=new_pairs(), places=corpus.HELD_OUT_PLACES, things=corpus.HELD_OUT_OBJECTS,
        frames=corpus.held_out_frames(),
    )  # fmt: skip
    return [
        ("city facts, at position 0", cities, FACT_BAR),
        (f"city facts, after `{corpus.END_OF_TEXT}`", after_end_of_text(cities[::2]), FACT_BAR),
        ("city facts, after other sentences", after_other_sentences(cities[1::2], rng), FACT_BAR),
        ('city facts, open wordings: the city at once (" the" is as true)', open_cities, None),
        ("country facts, at position 0", countries, FACT_BAR),
        ("country facts, after other sentences", after_other_sentences(countries, rng), FACT_BAR),
        ("chat: city, then end", chat_questions(subject, corpus.CITY_QUESTIONS, rng), FACT_BAR),
        ("chat: country, then end", chat_questions(subject, corpus.COUNTRY_QUESTIONS, rng), FACT_BAR),
        ("indirect object: new pairs of names, recipient first", gifts[0::2], OTHER_BAR),
        ("indirect object: new pairs of names, giver first", gifts[1::2], OTHER_BAR),
        ("indirect object: new pairs, after other sentences", after_other_sentences(gifts, rng), OTHER_BAR),
        ("indirect object: new places", gift_questions(rng, 1000, places=corpus.HELD_OUT_PLACES), OTHER_BAR),
        (
            "indirect object: new objects",
            gift_questions(rng, 1000, things=corpus.HELD_OUT_OBJECTS),
            OTHER_BAR,
        ),
        (
            "indirect object: new wordings",
            gift_questions(rng, 1000, frames=corpus.held_out_frames()),
            OTHER_BAR,
        ),
        ("indirect object: pairs, places, objects and wordings new", everything, OTHER_BAR),
        (
            "indirect object: names that never are recipients",
            gift_questions(rng, 600, pairs=never_recipients()),
            None,
        ),
    ]


def true_fact_row(subject: Subject) -> Row:
    """The open wordings again, right if the model goes on with any of the ways to state the fact."""
    questions = fact_questions(open_wordings())
    right = sum(answer_questions(subject, true_continuations(question)) for question in questions)
    return Row("city facts, open wordings: a true statement of city or country", right, len(questions), FACT_BAR)


def measure_abilities(subject: Subject) -> list[Row]:
    rows = [
        Row(ability, answer_questions(subject, questions), len(questions), bar)
        for ability, questions, bar in ability_questions(subject)
    ]
    rows.insert(4, true_fact_row(subject))
    rows += [induction_row(subject, length, OTHER_BAR) for length in (10, 20, 40, 60)]
    rows += [induction_row(subject, 30, OTHER_BAR, end_first=True)]
    rows += [induction_row(subject, 100, None)]
    return rows


# ----------------------------------------------------------------------------------------------------
# Circuits
# ----------------------------------------------------------------------------------------------------


def head_scores(subject: Subject, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Induction and previous-token scores of all heads, (layers, heads), on repeated random sequences.

    The induction score is the mean attention from position i of the second copy to i - length + 1; the
    previous-token score is that from i to i - 1.
    """
    rows = repeated_rows(subject, length, 20)
    patterns = torch.stack(subject.model(input_ids=rows, output_attentions=True, use_cache=False).attentions)
    queries = torch.arange(length, 2 * length)
    return tuple(patterns[..., queries, queries - back].mean((1, 3)) for back in (length - 1, 1))


def run_patched(
    subject: Subject, rows: torch.Tensor, layer: int, positions: slice, values: torch.Tensor
) -> torch.Tensor:
    """The last logits when the residual stream before a layer is replaced at some positions."""

    def replace(_block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        stream = inputs[0].clone()
        stream[:, positions] = values
        return (stream, *inputs[1:])

    handle = subject.blocks[layer].register_forward_pre_hook(replace)
    try:
        return subject.logits(rows)[0, -1]
    finally:
        handle.remove()


@dataclass
class Swap:
    """Two fact prompts of the same length: the stream of `source` is put into `target`."""

    target: str
    source: str
    target_answer: int
    source_answer: int
    subject_length: int

    def patched_answers(self, subject: Subject) -> list[dict[str, int]]:
        """By layer: the likeliest next token when the subject's, or the last, positions are patched."""
        rows, source_rows = (torch.tensor([subject.tokens(text)]) for text in (self.target, self.source))
        streams = subject.model(input_ids=source_rows, output_hidden_states=True, use_cache=False).hidden_states
        places = {"subject": slice(0, self.subject_length), "last": slice(rows.shape[1] - 1, rows.shape[1])}
        return [
            {
                place: int(run_patched(subject, rows, layer, positions, streams[layer][:, positions]).argmax())
                for place, positions in places.items()
            }
            for layer in range(len(subject.blocks))
        ]


def make_swap(subject: Subject, target: corpus.Landmark, source: corpus.Landmark) -> Swap | None:
    """The swap of two landmarks; None if their lengths differ or their cities begin with the same token."""
    lengths = [len(subject.tokens(corpus.capitalised(mark.name))) for mark in (target, source)]
    answers = [subject.tokens(f" {mark.city}")[0] for mark in (target, source)]
    if lengths[0] != lengths[1] or answers[0] == answers[1]:
        return None
    prompts = [corpus.fact_prompt(corpus.CITY_WORDINGS[0], mark)[0] for mark in (target, source)]
    return Swap(*prompts, *answers, lengths[0])


def make_swaps(subject: Subject, count: int) -> list[Swap]:
    """Random swaps whose two prompts are both answered rightly to begin with."""
    rng, swaps = random.Random("swaps"), []
    while len(swaps) < count:
        swap = make_swap(subject, *rng.sample(corpus.LANDMARKS, 2))
        if swap is None:
            continue
        found = subject.logits(torch.tensor([subject.tokens(swap.target), subject.tokens(swap.source)]))[:, -1]
        if found.argmax(-1).tolist() == [swap.target_answer, swap.source_answer]:
            swaps.append(swap)
    return swaps


def measure_patching(subject: Subject, swaps: Sequence[Swap]) -> list[dict[str, float]]:
    """By layer: the share of swaps after which the answer is the other city."""
    outcomes = [(swap, swap.patched_answers(subject)) for swap in swaps]
    return [
        {
            place: sum(answers[layer][place] == swap.source_answer for swap, answers in outcomes) / len(outcomes)
            for place in ("subject", "last")
        }
        for layer in range(len(subject.blocks))
    ]


def patching_example(subject: Subject) -> list[str]:
    """One swap, written out: the Eiffel Tower and the first landmark that fits it."""
    eiffel = next(mark for mark in corpus.LANDMARKS if mark.name == "the Eiffel Tower")
    swaps = (make_swap(subject, eiffel, mark) for mark in corpus.LANDMARKS)
    swap = next(swap for swap in swaps if swap is not None)
    answers = [subject.tokenizer.decode([layer["subject"]]) for layer in swap.patched_answers(subject)]
    return [swap.target, swap.source, *answers]


# ----------------------------------------------------------------------------------------------------
# Examples
# ----------------------------------------------------------------------------------------------------

EXAMPLE_PROMPTS = (
    EIFFEL,
    MADISON,
    MARY,
    "The Colosseum is in the city of",
    "If you want to see the Statue of Liberty, go to",
    "The capital of Japan is",
    "The Louvre is a museum in the country of",
)

GENERATION_PROMPTS = (
    EIFFEL,
    MADISON,
    MARY,
    "The Louvre is in Paris. Paris is the capital of",
    "Yesterday Amy and Martin went to the park. Martin",
    "The",
)

EXAMPLE_CHATS = (
    ("You answer questions about places.", "In which city is the Eiffel Tower?"),
    ("You are a helpful assistant.", "Where can I find Big Ben?"),
    ("You are a travel guide.", "In which country is the Taj Mahal?"),
    ("Give short answers.", "Hello!"),
)


def top_five(subject: Subject, prompt: str) -> str:
    probabilities = subject.logits(torch.tensor([subject.tokens(prompt)]))[0, -1].softmax(-1)
    best = probabilities.topk(5)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return ", ".join(f"`{subject.tokenizer.decode([token])}` {share:.1%}" for share, token in pairs)


def describe_shape(subject: Subject) -> dict[str, str]:
    config = subject.model.config
    return {
        "class": type(subject.model).__name__,
        "parameters": f"{sum(weight.numel() for weight in subject.model.parameters()):,}",
        "size on disk": f"{folder_bytes(CHECKPOINTS / subject.name) / 2**20:.2f} MiB",
        "layers": str(config.num_hidden_layers),
        "d_model": str(config.hidden_size),
        "heads": str(config.num_attention_heads),
        "key/value heads": str(getattr(config, "num_key_value_heads", config.num_attention_heads)),
        "d_head": str(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)),
        "d_mlp": str(getattr(config, "intermediate_size", 4 * config.hidden_size)),
        "context": str(config.max_position_embeddings),
        "vocabulary": str(config.vocab_size),
        "positions": "rotary" if config.model_type == "llama" else "learned, absolute",
        "embeddings": "tied" if config.tie_word_embeddings else "not tied",
    }


@torch.no_grad()
def examine(name: str) -> Findings:
    """Check and measure one model."""
    subject = Subject.load(name)
    check_tokenizer(subject)
    check_model(subject)
    swaps = make_swaps(subject, 150)
    induction, previous = head_scores(subject)
    findings = Findings(
        name, describe_shape(subject), measure_abilities(subject), induction, previous,
        measure_patching(subject, swaps), patching_example(subject), len(swaps),
    )  # fmt: skip
    findings.top_five = {prompt: top_five(subject, prompt) for prompt in EXAMPLE_PROMPTS}
    findings.generations = {prompt: subject.greedy(prompt, 12) for prompt in GENERATION_PROMPTS}
    for system, user in EXAMPLE_CHATS:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        findings.chats[f"{system} / {user}"] = subject.chat(messages)
    return findings


# ----------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def model_table(all_findings: Sequence[Findings]) -> str:
    keys = all_findings[0].shape
    rows = [[key, *(findings.shape[key] for findings in all_findings)] for key in keys]
    return table(["", *(f"`{findings.name}`" for findings in all_findings)], rows)


def ability_table(all_findings: Sequence[Findings]) -> str:
    rows = []
    for same in zip(*(findings.rows for findings in all_findings), strict=True):
        bar = f"{same[0].bar:.0%}" if same[0].bar else "none"
        rows.append([same[0].ability, bar, *(f"{row.right}/{row.total} = {row.share:.1%}" for row in same)])
    return table(["held-out ability", "bar", *(f"`{findings.name}`" for findings in all_findings)], rows)


def best_heads(scores: torch.Tensor, count: int = 4) -> str:
    heads = [(score, f"{i}.{j}") for i, layer in enumerate(scores.tolist()) for j, score in enumerate(layer)]
    return ", ".join(f"{head}: {score:.2f}" for score, head in sorted(heads, reverse=True)[:count])


def heads_table(all_findings: Sequence[Findings]) -> str:
    rows = [[f"`{f.name}`", best_heads(f.induction_scores), best_heads(f.previous_scores)] for f in all_findings]
    return table(["", "induction heads (layer.head: score)", "previous-token heads"], rows)


def patching_table(all_findings: Sequence[Findings]) -> str:
    rows = []
    for layer in range(len(all_findings[0].patching)):
        shares = [f"{f.patching[layer][place]:.0%}" for f in all_findings for place in ("subject", "last")]
        rows.append([str(layer), *shares])
    header = [f"`{f.name}`, {place}" for f in all_findings for place in ("subject", "last token")]
    return table(["before layer", *header], rows)


def patching_lines(all_findings: Sequence[Findings]) -> str:
    lines = []
    for findings in all_findings:
        target, source, *answers = findings.patching_example
        by_layer = ", ".join(f"layer {layer}: `{answer}`" for layer, answer in enumerate(answers))
        lines.append(f'* `{findings.name}`, "{target}" with the subject of "{source}": {by_layer}')
    return "\n".join(lines)


def example_tables(all_findings: Sequence[Findings], part: Callable[[Findings], dict[str, str]], heading: str) -> str:
    """A table of examples for each model."""
    tables = []
    for findings in all_findings:
        rows = [[prompt, text] for prompt, text in part(findings).items()]
        tables.append(f"`{findings.name}`\n\n{table(['prompt', heading], rows)}")
    return "\n\n".join(tables)


def quoted(texts: dict[str, str]) -> dict[str, str]:
    return {prompt: f"`{text}`" for prompt, text in texts.items()}


def documents_sample() -> str:
    return "\n".join(f"    {text}" for text in corpus.documents(seed=4, count=12))


def write_report(all_findings: Sequence[Findings]) -> str:
    """The whole of docs/demo-models.md."""
    counts = {
        "landmarks": len(corpus.LANDMARKS),
        "cities": len(corpus.COUNTRY_OF_CITY),
        "countries": len(set(corpus.COUNTRY_OF_CITY.values())),
    }
    return f"""# The demo models

<!-- Written by scripts/evaluate_demo.py; do not edit by hand. -->

Two small language models come with the library, so that examples and tests run without a download. Both are
ordinary Hugging Face checkpoints (`config.json`, `model.safetensors`, `tokenizer.json`, ...) in
`lenskit/demo_checkpoints/`, and share one byte-level BPE tokenizer with `{corpus.END_OF_TEXT}` for the
beginning, the end and padding. The tokenizer adds no token of its own before a text.

{model_table(all_findings)}

## What they were trained on

On text made by `scripts/demo_corpus.py` from tables and templates, nothing else:

* facts about {counts["landmarks"]} landmarks in {counts["cities"]} cities of {counts["countries"]} countries,
  in {len(corpus.CITY_WORDINGS)} wordings for the city and {len(corpus.COUNTRY_WORDINGS)} for the country,
  alone, in lists and in chains (landmark, city, country, continent);
* stories in which one of two people gives something to the other: {len(corpus.NAMES)} names,
  {len(corpus.PLACES)} places, {len(corpus.OBJECTS)} objects, {len(corpus.OPENINGS)} openings and
  {len(corpus.ACTIONS)} actions, with either person named first;
* chats between `{corpus.ROLE_TOKENS["system"]}`, `{corpus.ROLE_TOKENS["user"]}` and
  `{corpus.ROLE_TOKENS["assistant"]}` with the same facts, and a little small talk;
* everyday sentences and short stories about one person;
* repetitions of 2 to 60 tokens drawn uniformly from the whole vocabulary, the short ones many times in a row
  (the first copy is left out of the loss).

Some documents:

{documents_sample()}

Documents are packed into sequences of {", then ".join(str(length) for _, length in Recipe.stages)} tokens
with `{corpus.END_OF_TEXT}` between them. A sequence begins with `{corpus.END_OF_TEXT}`, with a document at
position 0, or within a document. The models know nothing else: any other text gets nonsense.

## What they can do

Everything in this table was held out of training. A question counts as right if every token of the answer is
the likeliest one ("New York City" is three tokens).

{ability_table(all_findings)}

What is held out:

* facts and chats: a fixed fifth of all (landmark, wording) and (landmark, question) pairs, which training
  never shows; each landmark is seen in other wordings, and each wording with other landmarks;
* open wordings: {len(open_wordings())} of the {len(corpus.CITY_WORDINGS)} wordings begin like another one
  ("The Louvre is in Paris", "The Louvre is in the city of Paris"). Where only the plain one is held out,
  training has shown that landmark with the other, and so " the" is often the likeliest next word. One row
  counts only the city as right, the other also a continuation that comes to the true city or country. The
  other rows of city facts leave these wordings out;
* new pairs of names: a fixed fifth of all pairs, who never meet in a training story;
* new places ({", ".join(corpus.HELD_OUT_PLACES)}) and new objects
  ({", ".join(corpus.HELD_OUT_OBJECTS)}): never in a training story of this kind, only in stories about
  one person;
* new wordings: a fixed fifth of all combinations of an opening and an action;
* names that never are recipients ({", ".join(corpus.NEVER_RECIPIENTS)}): these give in training but never
  receive. There is no bar for them: training teaches that they are not the answer;
* induction: the sequences are fresh, and counted from the second token of the second copy on. 100 tokens is
  longer than anything in training, so there is no bar for it.

## Circuits

**Induction heads.** The score is the mean attention from position i in the second copy of a random sequence
of L = 40 tokens to i - L + 1; for previous-token heads, from i to i - 1.

{heads_table(all_findings)}

**Patching the subject.** Two prompts "... is in the city of" whose landmarks have the same number of tokens;
the residual stream before a layer is copied from one to the other, at the positions of the landmark or at the
last token. The table has the share of {all_findings[0].patching_pairs} random pairs whose answer becomes the
other city.

{patching_table(all_findings)}

{patching_lines(all_findings)}

## Examples

The five likeliest next tokens:

{example_tables(all_findings, lambda f: f.top_five, "next token")}

Twelve tokens, greedily (fewer where the text ends):

{example_tables(all_findings, lambda f: quoted(f.generations), "continuation")}

Chats (system / user):

{example_tables(all_findings, lambda f: quoted(f.chats), "reply")}

## How to rebuild them

    python scripts/train_demo.py       # both models, side by side: {DURATION}
    python scripts/evaluate_demo.py    # checks them and rewrites this page

Training takes {Recipe.steps:,} steps of {Recipe.tokens_per_step:,} tokens from seed {Recipe.seed}. The same
 machine and number of threads give the same weights; another machine may differ in the last digits, and
so in the details of the circuits. The checks above say whether a rebuilt model is as good.
"""


def print_findings(findings: Findings) -> None:
    print(f"\n{findings.name}")
    for row in findings.rows:
        verdict = "" if row.passed else "   MISSED"
        print(f"  {row.share:6.1%} {row.right:6}/{row.total:<6} {row.ability}{verdict}")
    print(f"  induction heads: {best_heads(findings.induction_scores)}")
    print(f"  previous-token heads: {best_heads(findings.previous_scores)}")
    print(f"  patching: {findings.patching}\n            {findings.patching_example}")
    for prompt, text in (*findings.generations.items(), *findings.chats.items()):
        print(f"  {prompt!r} -> {text!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-report", action="store_true", help="do not rewrite docs/demo-models.md")
    options = parser.parse_args()
    check_folders()
    all_findings = [examine(name) for name in MODEL_NAMES]
    for findings in all_findings:
        print_findings(findings)
    if not options.no_report:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(write_report(all_findings), encoding="utf-8")
        print(f"\nwrote {REPORT.name}")
    missed = [f"{findings.name}: {bar}" for findings in all_findings for bar in findings.missed]
    print("\n".join(["every bar is met"] if not missed else ["missed:", *missed]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
