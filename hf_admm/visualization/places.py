"""Where the files of a run lie in its folder."""

RESULTS_NAME = "results.json"
MODEL_FOLDER = "model"
DENSE_FOLDER = "dense"
REPORT_FOLDER = "report"
PAGE_NAME = "index.html"
