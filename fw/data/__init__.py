"""Text and pictures in, batches out: records → pieces or pixels → rows → batch of a step."""

from fw.data.augment import Augment, augment_pairs
from fw.data.batches import Batches, count_tokens, eval_batches, prefetch
from fw.data.chat import Chat
from fw.data.columns import Columns
from fw.data.encode import Encoded, Windows, encode_tagged
from fw.data.encode_texts import encode_labelled, encode_multi_labelled, encode_rated
from fw.data.feed import feed
from fw.data.fit_columns import fit_columns
from fw.data.formats import FORMATS, Format
from fw.data.image_folders import encode_pictures, load_pictures
from fw.data.language import encode_documents, read_documents
from fw.data.masking import Masking, encode_maskable, masking
from fw.data.pack import Packed, best_fit_decreasing, pack, unpack_texts, unpack_words
from fw.data.pictures import Decoded
from fw.data.preprocess import Preprocessor
from fw.data.questions import Answer, Question, read_questions
from fw.data.readers import read_conll, read_json_lines, read_table
from fw.data.records import (
    Conversation,
    Document,
    Labelled,
    MultiLabelled,
    Picture,
    Rated,
    Record,
    Tagged,
    iob1_to_bio,
    label_names,
)
from fw.data.rows import Rows
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
    "Augment",
    "Batches",
    "Chat",
    "Columns",
    "Conversation",
    "Decoded",
    "Document",
    "Encoded",
    "Entry",
    "Format",
    "Labelled",
    "Masking",
    "MultiLabelled",
    "Packed",
    "Passage",
    "Picture",
    "Preprocessor",
    "Question",
    "Rated",
    "Record",
    "Rows",
    "Tagged",
    "Tokenizer",
    "Windows",
    "augment_pairs",
    "best_fit_decreasing",
    "count_tokens",
    "encode_documents",
    "encode_labelled",
    "encode_maskable",
    "encode_multi_labelled",
    "encode_pictures",
    "encode_questions",
    "encode_rated",
    "encode_tagged",
    "eval_batches",
    "feed",
    "fit_columns",
    "hold_out",
    "iob1_to_bio",
    "label_names",
    "load_pictures",
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
