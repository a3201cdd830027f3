"""What real pretrained models forget: two bases, tasks, measures, arms, and the report."""
