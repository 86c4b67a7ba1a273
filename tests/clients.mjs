// A conversation with a server by other people's JavaScript packages: `node clients.mjs PACKAGE URL TURNS`, beside a
// node_modules that has them. Prints [the answers, the answers when they are streamed] as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [name, baseURL, turns] = process.argv.slice(2);

async function openai(stream) {
  const chats = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 }).chat.completions;
  const messages = [];
  for (const content of JSON.parse(turns)) {
    messages.push({ role: "user", content });
    const body = { model: "tiny-chat", messages, max_tokens: 8, temperature: 0 };
    const answer = stream ? await chats.stream(body).finalChatCompletion() : await chats.create(body);
    messages.push(answer.choices[0].message);
  }
  return messages.filter((one) => one.role === "assistant").map((one) => one.content);
}

async function aiSdk(stream) {
  const model = createOpenAICompatible({ name: "jaxgpt", baseURL, apiKey: "none", includeUsage: true })("tiny-chat");
  const messages = [];
  const answers = [];
  for (const text of JSON.parse(turns)) {
    messages.push({ role: "user", content: [{ type: "text", text }] });
    const asked = { model, messages, maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
    const result = stream ? streamText(asked) : await generateText(asked);
    answers.push(await result.text);
    messages.push(...(await result.response).messages);
  }
  return answers;
}

const ask = { openai, "ai-sdk": aiSdk }[name];
console.log(JSON.stringify([await ask(false), await ask(true)]));
