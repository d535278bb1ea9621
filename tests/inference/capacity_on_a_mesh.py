"""What `jint8 fit` says of a model of three layers on two devices, and XLA of all of it; see `test_fit.py`."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

from family_files import config

import jint8
from jint8._inference.capacity import in_slots, measure, model_mesh
from jint8.cli import main
from jint8.models import model_config

CONFIG = config("opt") | {"num_hidden_layers": 3}
CONTEXT = 40
ARGUMENTS = [
    "--mesh",
    "2x2MB",
    "--reserve",
    "0.5MB",
    "--context",
    str(CONTEXT),
    "--dtype",
    "float32",
    "--json",
    "--quiet",
]

with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()) as out:
    file = Path(directory, "config.json")
    file.write_text(json.dumps(CONFIG))
    assert main(["fit", str(file), *ARGUMENTS]) == 0
model = model_config(CONFIG)
full = measure(model, model_mesh(model, 2), context=in_slots(CONTEXT), batch=1, quant=jint8.Config())
print(json.dumps({"fit": json.loads(out.getvalue()), "full": full}))
