"""Traffic on purpose: scenario files (``scenario``), the requests they mean (``traffic``), and runs of them on the
bundled engine (``recording``). Diagnosis knows nothing of this package."""
