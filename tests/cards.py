"""What the hub would say of a model card: the checks of `ModelCard.validate`, which asks the hub, as far as known."""

import re

from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id


def valid_card(path):
    """The card of a file, after its metadata was found to be what the hub takes."""
    data = metadata_load(path)
    assert isinstance(data, dict) and data
    for name in ("tags", "datasets", "metrics", "language"):
        values = data.get(name, [])
        values = [values] if isinstance(values, str) else values
        assert isinstance(values, list) and all(isinstance(value, str) and value for value in values), (name, values)
        assert len(set(values)) == len(values), (name, values)
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        validate_repo_id(base)
    for name in ("library_name", "pipeline_tag", "license"):
        assert re.fullmatch(r"[a-z0-9.-]+", data.get(name, "none")), (name, data[name])
    for model in data.get("model-index", []):
        assert isinstance(model["name"], str) and isinstance(model["results"], list)
    if any(model["results"] for model in data.get("model-index", [])):
        name, results = model_index_to_eval_results(data["model-index"])
        assert results and all(
            isinstance(result, EvalResult) and result.metric_value is not None for result in results
        )
        assert eval_results_to_model_index(name, results)[0]["name"] == name
    card = ModelCard.load(path)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return card
