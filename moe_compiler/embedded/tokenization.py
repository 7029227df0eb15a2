"""The tokenizer of the embedded model, and packing of documents into one row of tokens."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
CONTEXT_TOKENS = 1024


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; each digit is a token of its own, so that a number has one spelling.

    Args:
        documents: texts of all domains.
        vocabulary: number of tokens: 2 special ones, 256 bytes and the merges.

    Returns:
        The tokenizer, with `END_OF_TEXT` (number 0) between documents and `PADDING` (number 1).
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Encode documents one after the other, each with the end-of-text token at its end.

    Args:
        documents: texts of one domain.
        tokenizer: of the embedded model.

    Returns:
        Token numbers (T,), int64.
    """
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)])
