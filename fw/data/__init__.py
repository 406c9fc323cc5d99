"""Text in, batches out: records → pieces → rows → batch of a step."""

from fw.data.batches import Batches, count_tokens, eval_batches, prefetch
from fw.data.chat import Chat
from fw.data.columns import Columns
from fw.data.encode import Encoded, Windows, encode_tagged
from fw.data.encode_texts import encode_labelled, encode_multi_labelled, encode_rated
from fw.data.feed import feed
from fw.data.fit_columns import fit_columns
from fw.data.formats import FORMATS, Format
from fw.data.language import encode_documents, read_documents
from fw.data.masking import Masking, encode_maskable, masking
from fw.data.pack import Packed, best_fit_decreasing, pack, unpack_texts, unpack_words
from fw.data.questions import Answer, Question, read_questions
from fw.data.readers import read_conll, read_json_lines, read_table
from fw.data.records import (
    Conversation,
    Document,
    Labelled,
    MultiLabelled,
    Rated,
    Record,
    Tagged,
    iob1_to_bio,
    label_names,
)
from fw.data.splits import (
    SPLITS,
    TASKS,
    hold_out,
    load_splits,
    read_records,
    split_by_hash,
    split_records,
)
from fw.data.table import Entry, read_entries
from fw.data.tokenizer import Tokenizer, load_tokenizer
from fw.data.vader import read_vader, sentiment
from fw.data.windows import Passage, encode_questions, passages
from fw.labels import IGNORE

__all__ = [
    "FORMATS",
    "IGNORE",
    "SPLITS",
    "TASKS",
    "Answer",
    "Batches",
    "Chat",
    "Columns",
    "Conversation",
    "Document",
    "Encoded",
    "Entry",
    "Format",
    "Labelled",
    "Masking",
    "MultiLabelled",
    "Packed",
    "Passage",
    "Question",
    "Rated",
    "Record",
    "Tagged",
    "Tokenizer",
    "Windows",
    "best_fit_decreasing",
    "count_tokens",
    "encode_documents",
    "encode_labelled",
    "encode_maskable",
    "encode_multi_labelled",
    "encode_questions",
    "encode_rated",
    "encode_tagged",
    "eval_batches",
    "feed",
    "fit_columns",
    "hold_out",
    "iob1_to_bio",
    "label_names",
    "load_splits",
    "load_tokenizer",
    "masking",
    "pack",
    "passages",
    "prefetch",
    "read_conll",
    "read_documents",
    "read_entries",
    "read_json_lines",
    "read_questions",
    "read_records",
    "read_table",
    "read_vader",
    "sentiment",
    "split_by_hash",
    "split_records",
    "unpack_texts",
    "unpack_words",
]
