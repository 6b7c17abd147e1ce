"""The demo's tokenizers, each trained on the world's own text: byte-level BPE for the policy and the optimisation reward models,
lower-cased WordPiece for the held-out ones, so that the two judges do not even read alike."""
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

START, END, PAD, UNKNOWN = "<|start|>", "<|end|>", "<|pad|>", "<|unknown|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}{{- '<|' ~ message.role ~ '|>' ~ message.content ~ eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
ENCODER_CHAT_TEMPLATE = "[CLS]{%- for message in messages -%}{{- ' ' ~ message.content ~ ' [SEP]' -}}{%- endfor -%}"


def byte_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens, any text round-trips; with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, so every level of a control is spelled with the same few tokens.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *ROLE_MARKERS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD, extra_special_tokens=list(ROLE_MARKERS),
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=512)


def word_piece(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Lower-cased WordPiece of at most `size` tokens; its template writes a chat as `[CLS] prompt [SEP] answer [SEP]`.

    Its pieces are letters and the most frequent words: the library's trainer numbers them in the order of a hash table, which differs
    from run to run, and with it would every model trained from the same seed.
    """
    normaliser, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text)))
    letters = sorted(set("".join(counts)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *words][:size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normaliser, splitter, decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        chat_template=ENCODER_CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=512)
