"""The only folder that imports ray: one file a verb, each with run(experiment) -> Path and plan(experiment) -> str."""
