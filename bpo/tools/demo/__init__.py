"""The small synthetic world that the first command runs on: scenes, base model, controls, report."""
