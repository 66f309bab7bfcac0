"""Its being here puts this folder on the path: tests in every folder below import ``endpoint_server``."""
