"""What a run is worth. Each metric is one public function: `ranking` holds those of ranked candidates."""
