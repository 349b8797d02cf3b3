//! Greedy decoding: the likeliest token, again and again.

use std::time::{Duration, Instant};

use crate::attend::Attend;
use crate::error::{Error, Result};
use crate::llama::Llama;

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// How far its logit is above that of the second.
    pub margin: f32,
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// From the prompt to the first token.
    pub prompt: Duration,
    /// Tokens after the first.
    pub decoded_tokens: usize,
    /// For all of these.
    pub decoding: Duration,
}

/// Tokens in a second.
pub fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

/// The tokens of a question, in the form in which the model was taught to answer.
///
/// # Errors
///
/// [`Error::Tokenizer`] if the tokenizer refuses the text.
pub fn prompt(model: &Llama, question: &str) -> Result<Vec<u32>> {
    let text = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    );
    let encoding = model.tokenizer.encode(text, false).map_err(|error| Error::Tokenizer(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

/// The two largest of some logits: where the first stands, and how far it is above the second.
fn choose(logits: &[f32]) -> Choice {
    let (mut token, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if logit > first {
            (token, first, second) = (index as u32, logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    Choice { token, margin: first - second }
}

/// Positions that a prompt of some tokens and an answer of at most `most` need; an error where the model has not as many.
///
/// # Errors
///
/// [`Error::NoText`] if the prompt is empty, and [`Error::TooLong`] if the model has not as many positions.
pub fn positions(model: &Llama, prompt: &[u32], most: usize) -> Result<usize> {
    if prompt.is_empty() {
        return Err(Error::NoText);
    }
    let tokens = prompt.len().saturating_add(most);
    if tokens > model.context {
        return Err(Error::TooLong { index: 1, tokens, limit: model.context });
    }
    Ok(tokens)
}

/// Answers a prompt with at most `most` tokens and stops before the token that ends an answer. `each` gets each token as it comes.
///
/// # Errors
///
/// Those of [`positions`], of [`Llama::forward`] and of `each`.
pub fn greedy(
    model: &Llama,
    prompt: &[u32],
    most: usize,
    attend: &mut Attend<'_>,
    each: &mut dyn FnMut(Choice) -> Result<()>,
) -> Result<Timing> {
    positions(model, prompt, most)?;
    let mut timing = Timing { prompt_tokens: prompt.len(), ..Timing::default() };
    let began = Instant::now();
    let mut logits = model.forward(prompt, 0, attend)?;
    timing.prompt = began.elapsed();
    let began = Instant::now();
    for count in 0..most {
        let choice = choose(&logits.to_vec1()?);
        if choice.token == model.end {
            break;
        }
        each(choice)?;
        if count + 1 < most {
            logits = model.forward(&[choice.token], prompt.len() + count, attend)?;
            timing.decoded_tokens += 1;
        }
    }
    timing.decoding = began.elapsed();
    Ok(timing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logit_wins() {
        assert_eq!(choose(&[1.0, 3.0, 2.5, -1.0]), Choice { token: 1, margin: 0.5 });
        assert_eq!(choose(&[3.0, 3.0]), Choice { token: 0, margin: 0.0 });
    }
}
