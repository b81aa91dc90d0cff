"""Instruction data: prompts and responses in one prompt style, split so that no question leaks."""

import datetime
import itertools
from collections.abc import Sequence
from typing import Any, get_args

import torch

from datamodules import chat_template, splits
from datamodules.batching import Sample
from datamodules.entries import Item, make_item, read_entries
from datamodules.prompts import (
    IGNORE,
    TEMPLATE,
    Message,
    Supervise,
    check_replies,
    check_style,
    encode_conversation,
    encode_prompt,
    reply_opening,
    stop_ids,
    surplus,
)
from datamodules.split_data_module import SplitDataModule

Turn = tuple[str, str]  # the question's key, and the answer
# the date that templates write into training texts: fixed, so that resumed runs see the same
LEARNED_ON = datetime.datetime(2024, 7, 26)  # the default of Llama 3's template


class InstructionDataModule(SplitDataModule):
    """Prompts and responses in a prompt style; the test set is what training and validation leave.

    Entries that start with the same question (up to case, punctuation and spacing) stay on one side
    of the split, as does one that repeats another's first question and answer in a later turn. With
    shuffle_split whole groups are assigned at random. Otherwise it is the book's split in file
    order: the first `train_fraction` of the entries for training, the next for testing, the last
    `val_fraction` for validation, each rounded to whole entries; but an entry whose question has
    occurred before joins the first one's set, so that the later sets are smaller by their repeats.

    A sample longer than `max_length` keeps its (last) response whole and loses the middle of the
    prompt, whose start says what is asked and whose end opens the response.

    Args:
        source: a file, folder or glob, or bundled:instructions. Each file is a JSON list, .jsonl
            with one object per line, or a .parquet, .csv or .tsv table. Entries have `instruction`,
            `input` (optional) and `output`; or `messages`; or TRL's `prompt` and `completion`
            (texts, or lists of messages; those of the prompt carry no loss); or ShareGPT's
            `conversations`. null: no training, all of test_source is answered.
        prompt_style: alpaca, phi3, chatml, or template (the one published with the tokenizer).
        supervise: "response" takes the loss on the assistant's turns, "all" on every token.
        max_length: maximum tokens per sample; at most the model's block_size.
        shuffle_split: split at random, by split_seed; otherwise in file order.
        **options: those of `SplitDataModule`.

    Raises:
        ValueError: for an invalid argument, before any data is read; from `read` and `setup` for
            unusable data, naming file and entry.
    """

    cut = "the middle of their prompts is"
    units = "questions"
    differ = "in the first question, by more than punctuation"
    order = ("train", "test", "val")  # the book's

    def __init__(
        self,
        *,
        source: str | None,
        prompt_style: str,
        supervise: Supervise,
        max_length: int,
        shuffle_split: bool,
        **options: Any,
    ) -> None:
        super().__init__(source=source, **options)
        check_style(prompt_style)
        if supervise not in get_args(Supervise):
            raise ValueError(f"data.supervise is {supervise!r}; choose response or all.")
        if max_length < 2:
            raise ValueError(f"data.max_length is {max_length}; give at least 2 tokens.")
        if source is None and self.test_source is None:
            raise ValueError("data.source is null, and so is data.test_source; give one of them.")
        self.max_length, self.shuffle_split = max_length, shuffle_split
        self.prompt_style, self.supervise = prompt_style, supervise

    def check(self, stage: str) -> None:
        """Refuses a tokenizer without the template asked for, or with one unfit for training."""
        if self.source is None and stage == "fit":
            raise ValueError("data.source is null, there is nothing to train on; give entries.")
        check_style(self.prompt_style, self.tokenizer)
        if stage == "fit" and self.prompt_style == TEMPLATE:
            check_replies(self.tokenizer)

    def read(self) -> None:
        """Reads and splits the entries."""
        self._items: list[Item] = self._read(read_entries, make_item)
        turns = [_turns(item) for item in self._items]
        self._asked = [[asked for asked, _ in conversation] for conversation in turns]
        self._split(_question_keys(turns))

    def items(self, split: str) -> list[Item]:
        """Entries of the train, val or test split, in the order of its samples."""
        return [self._items[row] for row in self._rows[split]]

    def keys(self, split: str) -> list[str]:
        """One key for each of `items`, equal for entries that start with the same question."""
        return [self._asked[row][0] for row in self._rows[split]]

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to answer: the prompt style, and the ids that end a response."""
        return {
            "prompt_style": self.prompt_style,
            "stop_ids": stop_ids(self.tokenizer, self.prompt_style),
        }

    def _to_encode(self) -> Sequence[int]:
        return range(len(self._items))  # also those in no split, for the counts

    def _sample(self, row: int) -> tuple[Sample, bool]:
        item = self._items[row]
        with chat_template.on(LEARNED_ON):
            ids, labels = encode_conversation(
                self.tokenizer, self.prompt_style, _said(item), supervise=self.supervise
            )
            if self.supervise == "response":
                _unlearn(labels, item["n_given"])
            is_cut = len(ids) > self.max_length
            if is_cut:
                self._cut(ids, labels, item)
        input_ids, learned = torch.tensor(ids), torch.tensor(labels)
        return Sample(sample_id=row, input_ids=input_ids, labels=learned), is_cut

    def _counts(self) -> dict[str, int]:
        return {"items": len(self._items), **{split: len(r) for split, r in self._rows.items()}}

    def _learned(self) -> list[str]:
        return [asked for row in self._rows["train"] for asked in self._asked[row]]

    def _cut(self, ids: list[int], labels: list[int], item: Item) -> None:
        """Removes the middle of the prompt of a sample that is too long, in place."""
        n_prompt = len(encode_prompt(self.tokenizer, self.prompt_style, item["messages"]))
        n_opening = len(reply_opening(self.tokenizer, self.prompt_style))
        n_response = len(ids) - n_prompt
        if n_opening + n_response > self.max_length:
            raise ValueError(
                f"the response and what opens it have {n_opening + n_response} tokens, "
                f"data.max_length is {self.max_length}; raise it (and model.block_size), or "
                "shorten the response."
            )
        middle = surplus(n_prompt, self.max_length - n_response, n_opening)
        del ids[middle], labels[middle]
        rest = range(middle.start, len(ids) - n_response if self.supervise == "response" else 0)
        for i in itertools.takewhile(lambda i: labels[i] != IGNORE, rest):
            labels[i] = IGNORE  # the rest of an answer that the cut goes through
        labels[middle.start] = IGNORE  # its context is gone


def _unlearn(labels: list[int], n_answers: int) -> None:
    """Removes the loss from the first answers, in place."""
    runs = itertools.groupby(range(len(labels)), lambda i: labels[i] != IGNORE)
    answers = (list(run) for is_learned, run in runs if is_learned)
    for i in itertools.chain.from_iterable(itertools.islice(answers, n_answers)):
        labels[i] = IGNORE


def _question_keys(conversations: Sequence[Sequence[Turn]]) -> list[str]:
    """A key per conversation, equal where one gives away the answer to another's question.

    That holds if both start with the same question, whatever the system message, or if one repeats
    the other's first question and answer in a later turn: every answer of a conversation is
    learned. Turns that recur in the middle of many conversations ("Thanks!") do not join them.
    """
    first = {asked for (asked, _), *_ in conversations}
    later = {asked for _, *turns in conversations for asked, _ in turns}
    both = first & later
    return splits.joined(
        [
            [turns[0][0], *(f"{asked}\n{_key(answer)}" for asked, answer in turns if asked in both)]
            for turns in conversations
        ]
    )


def _turns(item: Item) -> list[Turn]:
    """The questions of a conversation, as keys, and the answers to them."""
    turns: list[Turn] = []
    asked = ""
    for message in _said(item):
        if message["role"] == "user":
            asked += _key(message["content"])
        elif asked and message["role"] == "assistant":
            turns.append((asked, message["content"]))
            asked = ""
    return turns


def _said(item: Item) -> list[Message]:
    return [*item["messages"], Message(role="assistant", content=item["reference"])]


def _key(text: str) -> str:
    return splits.canonical_key(text, mask_digits=False)
