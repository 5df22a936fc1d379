"""Room `operations`, storey 5: where the runs of a folder stand. No torch.

run_folders.py   which folders are runs
run_state.py     running, killed ...; what a living run is doing
run_status.py    RunStatus: where each run of a folder stands
run_table.py     runs and one run's account as terminal tables
"""
