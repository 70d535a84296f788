//! Decides whether to retry a job whose sandbox failed before anything of the job ran in it.

use crate::sandbox::SandboxError;

/// How many lost sandboxes are replaced for one job before the job fails.
const MAX_LOST: usize = 3;

/// Counts the sandboxes that one job has lost.
#[derive(Debug, Default)]
pub struct Retries {
    lost: usize,
}

impl Retries {
    /// Whether to run the job again, in another sandbox, after this error.
    pub fn allow(&mut self, error: &SandboxError) -> bool {
        match error {
            SandboxError::Lost => {
                self.lost += 1;
                self.lost <= MAX_LOST
            }
            // The compiled files are then marked as unusable, so this happens at most once.
            SandboxError::NotCarried => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_is_retried_a_bounded_number_of_times_if_nothing_ran() {
        let mut retries = Retries::default();
        assert!(!retries.allow(&SandboxError::Gone("killed".into())) && !retries.allow(&SandboxError::HostMemory));
        assert!((0..MAX_LOST).all(|_| retries.allow(&SandboxError::Lost)));
        assert!(retries.allow(&SandboxError::NotCarried));
        assert!(!retries.allow(&SandboxError::Lost));
    }
}
