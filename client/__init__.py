"""One hospital: policy, ledger, cohort, private training, Flower client app. Patients' data never leave this room."""
