"""Evidence about a build: run records, dvc.yaml and dvc.lock readers, code closure, bundle, statement, signature."""
