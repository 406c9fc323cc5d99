"""Text in, batches out: records → pieces → rows → batch of a step."""

from fw.data.batches import Batches, count_tokens, eval_batches, prefetch
from fw.data.chat import Chat
from fw.data.encode import Encoded, encode_labelled, encode_tagged
from fw.data.feed import feed
from fw.data.language import (
    Conversation,
    Document,
    encode_conversations,
    encode_documents,
    pack_words,
    read_conversations,
    read_documents,
)
from fw.data.pack import Packed, best_fit_decreasing, pack, unpack_texts, unpack_words
from fw.data.readers import read_conll, read_json_lines, read_table
from fw.data.records import Labelled, Record, Tagged, iob1_to_bio, label_names
from fw.data.splits import (
    SPLITS,
    TASKS,
    hold_out,
    load_splits,
    read_records,
    split_by_hash,
    split_records,
)
from fw.data.tokenizer import Tokenizer, load_tokenizer
from fw.data.vader import read_vader, sentiment
from fw.labels import IGNORE

__all__ = [
    "IGNORE",
    "SPLITS",
    "TASKS",
    "Batches",
    "Chat",
    "Conversation",
    "Document",
    "Encoded",
    "Labelled",
    "Packed",
    "Record",
    "Tagged",
    "Tokenizer",
    "best_fit_decreasing",
    "count_tokens",
    "encode_conversations",
    "encode_documents",
    "encode_labelled",
    "encode_tagged",
    "eval_batches",
    "feed",
    "hold_out",
    "iob1_to_bio",
    "label_names",
    "load_splits",
    "load_tokenizer",
    "pack",
    "pack_words",
    "prefetch",
    "read_conll",
    "read_conversations",
    "read_documents",
    "read_json_lines",
    "read_records",
    "read_table",
    "read_vader",
    "sentiment",
    "split_by_hash",
    "split_records",
    "unpack_texts",
    "unpack_words",
]
