"""What every layer may use: errors, logs, progress. Imports nothing of ours."""
