"""Measurements of fewshot_asam beside its peers; `benchmarks/README.md` says which command measures what."""
