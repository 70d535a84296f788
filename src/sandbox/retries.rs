//! Retries of a job whose sandbox failed before anything of the job ran in it.

use crate::sandbox::SandboxError;

/// Lost sandboxes that are replaced for one job, before it is given up.
const MOST: usize = 3;

/// Counts the sandboxes that one job has lost.
#[derive(Debug, Default)]
pub struct Retries {
    lost: usize,
}

impl Retries {
    /// Whether the job is to be run again, in another sandbox, after this error.
    pub fn allow(&mut self, error: &SandboxError) -> bool {
        match error {
            SandboxError::Lost => {
                self.lost += 1;
                self.lost <= MOST
            }
            // No sandbox is given these compiled files again, so this happens once.
            SandboxError::NotCarried => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_run_again_only_if_nothing_of_it_has_run_and_not_without_end() {
        let mut retries = Retries::default();
        assert!(!retries.allow(&SandboxError::Gone("killed".into())) && !retries.allow(&SandboxError::HostMemory));
        assert!((0..MOST).all(|_| retries.allow(&SandboxError::Lost)));
        assert!(retries.allow(&SandboxError::NotCarried));
        assert!(!retries.allow(&SandboxError::Lost));
    }
}
