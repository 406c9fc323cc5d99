"""What a model can be read from: its config and its tensors, whatever form they have.

A folder of transformers says its config; a GGUF file says one in words of its own; of a state dict
of torch, which says none, the shapes of the tensors tell what it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fw.gguf import gguf_file, open_gguf
from fw.hub.files import CONFIG, Tensors, open_tensors, read_json
from fw.hub.torch_file import open_torch, torch_file
from fw.models import efficientnet


@contextmanager
def open_model(place: Path) -> Iterator[tuple[Path, Mapping[str, Any], Tensors]]:
    """Opens a model folder, or a GGUF or `.pth` file, or a folder that holds one.

    Yields:
      What says the config, the config in the form of `config.json`, and every tensor by name.

    Raises:
      FwError: as `read_json`, `open_tensors`, `fw.gguf.open_gguf`, `open_torch` and
        `fw.models.efficientnet.described` do.
    """
    if (file := gguf_file(place)) is not None:
        opened = open_gguf(file)
        yield file, opened.config, opened.tensors
    elif (file := torch_file(place)) is not None:
        with open_torch(file) as tensors:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            yield file, efficientnet.described(shapes, file), tensors
    else:
        source = read_json(place / CONFIG)
        with open_tensors(place) as tensors:
            yield place / CONFIG, source, tensors
