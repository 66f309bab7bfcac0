"""A language model of a few thousand weights with its tokenizer, made here."""

import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "good",
    "bad",
    "fine",
    "poor",
    "answer",
    "reply",
    "is",
    "was",
    "not",
    "very",
    "human",
    "assistant",
    "user",
    ":",
    ".",
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def model(kind="llama", vocabulary=64, seed=0):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)).eval()
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **sizes)).eval()
