"""What `jint8 plan` says of fixtures on two devices, and what is compiled and loaded, as JSON; see `test_plan.py`."""

import contextlib
import io
import json

import jax
from family_files import DIRECTORY, config

import jint8
from jint8._capacity import at_layers, layers, measure, model_mesh
from jint8.cli import main
from jint8.models import model_config

LAYERS = 3
llama = model_config(config("llama"))
mesh = model_mesh(llama, 2)
options = {"context": 256, "batch": 1, "quant": jint8.Config()}
one, two, full = (measure(layers(llama, n), mesh, **options) for n in (1, 2, LAYERS))
along = {name: at_layers(one.get(name, 0), two.get(name, 0), LAYERS) for name in {**one, **two}}

out = io.StringIO()
with contextlib.redirect_stdout(out):
    arguments = ["--mesh", "2x2MB", "--reserve", "0.5MB", "--context", "40", "--dtype", "float32", "--json", "--quiet"]
    assert main(["plan", str(DIRECTORY / "opt"), *arguments]) == 0
loaded = jint8.load(DIRECTORY / "opt", dtype="float32", mesh=mesh)
nbytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded.params))
print(json.dumps({"full": full, "along": along, "plan": json.loads(out.getvalue()), "loaded": nbytes}))
