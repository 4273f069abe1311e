"""Stage two: objectives, tuning, training of students."""
