"""Ablations: tables of papers rerun as ordinary training runs, with several seeds and intervals of confidence.

table = load_table("k")                                   # configs/ablations/k.yaml
plan = plan_runs(table, "runs/ablations", seeds=range(3))
failures = train_runs(plan.runs, jobs=2)
results = collect(plan)                                   # means, paired differences and verdicts, ready for JSON
"""
