"""Where the pipeline runs: Ray, on this machine or on a cluster. Knows neither torch nor MLflow."""
