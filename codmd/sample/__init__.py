"""Videos from a student or a teacher: samplers, file names, the folder they go to, contact sheets."""
