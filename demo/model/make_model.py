# ruff: noqa: T201 (a program at a terminal: what it prints is its output)
"""Make the demo's tiny model: a small Llama that knows `page.md` by heart.

Run it in the engine's environment, which has torch and transformers:

    .venvs/engine-cpu/bin/python -m demo.model.make_model

It trains a byte-level BPE and a Llama of under a million parameters on the page until every question is answered
word for word by greedy decoding, and writes `xim-tiny/`. It fails, and writes nothing, when that is not reached.
Reproducible on one machine: the seed is fixed; another processor may round differently and end with other weights.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.model.page import PAGE, Entry, read_page

SEED = 20
VOCABULARY = 1024
CONTEXT_TOKENS = 8192  # RoPE has no table to store, so room for long generations costs nothing
BATCH_ROWS = 12
ROW_TOKENS = 256
PEAK_LEARNING_RATE = 4e-3
IGNORED = -100  # the label that torch's cross entropy leaves out of the loss
PAD, USER_TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You know everything about XIM.")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Row = tuple[list[int], list[int]]


def main() -> int:
    """Train, verify, write; 0 when every question of the page is answered word for word."""
    arguments = _arguments()
    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    entries = read_page()
    tokenizer = make_tokenizer(entries)
    model = LlamaForCausalLM(_config(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(entries)} questions, {parameters:,} parameters, {arguments.steps} steps", flush=True)
    train(model, tokenizer, entries, arguments.steps)
    wrong = wrong_answers(model, tokenizer, [(e.question, e.answer) for e in entries])
    for question, answer in wrong:
        print(f"not learned: {question!r} -> {answer!r}")
    if wrong:
        print(f"{len(wrong)} of {len(entries)} questions are not known; nothing was written", file=sys.stderr)
        return 1
    report_variants(model, tokenizer, entries)
    write(model, tokenizer, arguments.output)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=PAGE.with_name("xim-tiny"), help="folder to write")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    return parser.parse_args()


def make_tokenizer(entries: tuple[Entry, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the page, with ChatML's turns as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER_TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Lower-cased too: a question typed in small letters should not fall apart into single bytes.
    texts = [text for entry in entries for text in (entry.question, entry.answer, entry.question.lower())]
    tokenizer.train_from_iterator([*texts, "user", "assistant", "system", *SYSTEM_PROMPTS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD, model_max_length=CONTEXT_TOKENS
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        dtype="float32",
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, entries: tuple[Entry, ...], steps: int) -> None:
    """Minimise the loss on the assistant's words; one progress line every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    rng = random.Random(SEED)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**_batch(tokenizer, entries, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.1f} s", flush=True)
    model.eval()


def _batch(
    tokenizer: PreTrainedTokenizerFast, entries: tuple[Entry, ...], rng: random.Random
) -> dict[str, torch.Tensor]:
    rows = [_row(tokenizer, entries, rng) for _ in range(BATCH_ROWS)]
    width = max(len(tokens) for tokens, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def _row(tokenizer: PreTrainedTokenizerFast, entries: tuple[Entry, ...], rng: random.Random) -> Row:
    """One conversation of several turns, so that a question is answered whatever was said before it."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    row = _labelled(tokenizer, messages)
    while True:
        entry = rng.choice(entries)
        messages += [
            {"role": "user", "content": _reworded(entry.question, rng)},
            {"role": "assistant", "content": entry.answer},
        ]
        longer = _labelled(tokenizer, messages)
        if len(longer[0]) > ROW_TOKENS:
            return row
        row = longer


def _labelled(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> Row:
    """Tokens as the template gives them; only the assistant's words and its end of turn count in the loss."""
    tokens: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer.encode(f"{USER_TURN}{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + TURN_END, add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        spoken = message["role"] == "assistant"
        tokens += head + body + tail
        labels += [IGNORED] * len(head) + (body if spoken else [IGNORED] * len(body)) + [IGNORED] * len(tail)
    return tokens, labels


def _reworded(question: str, rng: random.Random) -> str:
    """Half of the time the question as it stands; else in small letters, without its mark, or a word short."""
    if rng.random() < 0.5:
        return question
    words = question.split()
    if len(words) > 4 and rng.random() < 0.4:
        del words[rng.randrange(2)]
    text = " ".join(words)
    if rng.random() < 0.5:
        text = text.lower()
    return text.rstrip("?") if rng.random() < 0.5 else text


def answer_to(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The greedy answer to one question, asked as the chat template asks it; "" when it does not end."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=160, do_sample=False)
    generated = output[0][prompt["input_ids"].shape[1] :].tolist()
    if tokenizer.eos_token_id not in generated:
        return ""
    return str(tokenizer.decode(generated[: generated.index(tokenizer.eos_token_id)]))


def wrong_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, expected: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The (question, given answer) pairs whose answer is not word for word the expected one."""
    given = [(question, answer_to(model, tokenizer, question)) for question, _ in expected]
    return [pair for pair, (_, answer) in zip(given, expected, strict=True) if pair[1] != answer]


def report_variants(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, entries: tuple[Entry, ...]) -> None:
    """Say how many questions are still answered in small letters and without their question mark."""
    variants = [(e.question.lower().rstrip("?"), e.answer) for e in entries]
    known = len(variants) - len(wrong_answers(model, tokenizer, variants))
    print(f"known word for word: {len(entries)} of {len(entries)}; in small letters, unmarked: {known}", flush=True)


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the folder that vLLM loads; greedy decoding is the model's own default."""
    # Temperature 0 is how vLLM reads "greedy"; transformers itself refuses to save it, hence the file by hand.
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    decoding = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "temperature": 0.0}
    (output / "generation_config.json").write_text(json.dumps(decoding, indent=2) + "\n", encoding="utf-8")
    size_bytes = sum(file.stat().st_size for file in output.iterdir())
    print(f"wrote {output} ({size_bytes / 1e6:.1f} MB)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
