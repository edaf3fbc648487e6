"""What a run leaves behind: its folder and state, its metrics, its progress, and a copy of them in MLflow."""
