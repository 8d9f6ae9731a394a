"""How a query is put to an in-context-learning embedder: examples of its task, the query, a suffix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.families import IclConfig
from rayembed.models.encoding import special_tokens

BETWEEN = "\n\n"  # after every example


def icl_section(experiment: Experiment) -> IclConfig | None:
    """Section icl, with its defaults where the file has none; None for other families."""
    section: IclConfig | None = experiment.family_sections().get("icl")
    return section


def reader_of(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> "QueryReader | None":
    """How queries are read; None for families that read them as they read passages."""
    icl = icl_section(experiment)
    return None if icl is None else QueryReader(tokenizer, icl)


@dataclass(frozen=True)
class QueryReader:
    """Queries to token ids, in training as in mining and evaluation."""

    tokenizer: PreTrainedTokenizerBase
    icl: IclConfig

    @cached_property
    def suffix(self) -> str:
        """What is put after a query, and between an example's query and its response."""
        return self.icl.icl_suffix_str.replace("\\n", "\n")

    def tokens(self, queries: Sequence[str], max_len: int, examples: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of examples, query and suffix, in one text.

        Args:
            queries: N texts, each with its instruction.
            max_len: tokens of query, suffix and special tokens; the query is cut, the suffix never is.
            examples: [N] what is put before each, and not counted. None: nothing.

        Raises:
            ValueError: the length leaves nothing of a query.
        """
        if not queries:
            return []
        kept = max_len - sum(special_tokens(self.tokenizer)) - len(self._ids([self.suffix])[0])
        if kept < 1:
            raise ValueError(
                f"{max_len} tokens of a query leave none beside the suffix {self.suffix!r} (icl.icl_suffix_str); raise "
                "data.query_max_len, or shorten it"
            )
        before = examples if examples is not None else [""] * len(queries)
        texts = [f"{first}{query}{self.suffix}" for first, query in zip(before, self.cut(queries, kept), strict=True)]
        ids: list[list[int]] = self.tokenizer(texts, return_attention_mask=False)["input_ids"]
        return ids

    def cut(self, texts: Sequence[str], max_len: int) -> list[str]:
        """The texts, cut where their token number `max_len` ends; special tokens are not counted.

        FlagEmbedding decodes the tokens that are kept, which gives other texts with some tokenizers.
        """
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = [spans[:max_len][-1][1] if len(spans) > max_len else None for spans in found["offset_mapping"]]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    def shortened(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Examples of (query with instruction, response), each cut to its length."""
        queries = self.cut([query for query, _ in pairs], self.icl.example_query_max_len)
        responses = self.cut([response for _, response in pairs], self.icl.example_passage_max_len)
        return self.written(list(zip(queries, responses, strict=True)))

    def written(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Examples of (query with instruction, response), with what stands between and after the two."""
        return [f"{query}{self.suffix}{response}{BETWEEN}" for query, response in pairs]

    def joined(self, examples: Sequence[str]) -> str:
        """The examples one after the other, up to the first that is beyond icl.examples_max_len."""
        total, kept = 0, []
        for example, ids in zip(examples, self._ids(examples), strict=True):
            total += len(ids)
            if total > self.icl.examples_max_len:
                break
            kept.append(example)
        return "".join(kept)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def num_tokens(self, text: str) -> int:
        """Tokens of a text without special ones."""
        return len(self._ids([text])[0])
