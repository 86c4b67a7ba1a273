"""What the made-up customer service says, and what it is asked: the tables of `dialogues.support_records`.

Wordings stand side by side with | between them, and {slots} are filled alike in a whole conversation. Answers never
promise what an order system would have to look up, other than by a slot: the point is the form of an answer and its
end, not facts about a shop.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    steps: tuple[tuple[str, str], ...]
    """(what the user may say, what the assistant may answer), one pair after another."""
    extras: tuple[tuple[str, str], ...] = ()
    """Pairs of which one may follow."""


class Language(NamedTuple):
    slots: dict[str, str]
    """Values of each slot, | between them; # is a random digit, the first of them never 0."""
    before: str
    """What a user may put before the first words, and after them."""
    after: str
    greeting: tuple[str, str]
    topics: dict[str, Topic]
    closing: tuple[str, str]


_ENGLISH_TOPICS = {
    "delivery": Topic(
        (
            (
                "Where is my parcel?|When will my order arrive?|My order has not come yet.|I am still waiting for my "
                "{item}.|Can you tell me where my {item} is?|Could you track my order?",
                "I can look that up. What is your order number?|Please give me your order number, and I will check.|"
                "I am sorry for the wait. May I have the order number?",
            ),
            (
                "It is {order}.|{order}|The number is {order}.|Order {order}.|Sure, {order}.",
                "Thank you. Order {order} is on its way and should arrive on {day}.|Order {order} left our warehouse "
                "in {city}. You will have it by {day}.|I found order {order}. It will be delivered on {day} "
                "{time_of_day}.",
            ),
        ),
        (
            (
                "Can I change the address?|Could it go to another address?|I will not be at home on {day}.",
                "Yes. Please send us the new address before {time}, and the driver will use it.|Of course. A "
                "neighbour can take it, or you can collect it from our shop in {city}.",
            ),
            (
                "How much is the delivery?|Do I have to pay for delivery?|What does shipping cost?",
                "Delivery is free for orders over {price}.|Standard delivery costs {fee}, and it is free over {price}.",
            ),
        ),
    ),
    "refund": Topic(
        (
            (
                "I want my money back.|How do I return the {item}?|I would like to send back my {item}.|The {item} "
                "does not fit me.|Can I get a refund for the {item}?",
                "You can return it within {days} days. Do you still have the receipt?|Yes, within {days} days. Is the "
                "{item} still unused?|I can help with that. Is it still in its box?",
            ),
            (
                "Yes, I do.|Yes.|Yes, it is.|Of course.|I think so.",
                "Good. Print the label from your account and bring the parcel to any post office. The refund takes "
                "{days} days.|Then please send it back with the return label. You will get {price} within {days} days.",
            ),
        ),
        (
            (
                "Who pays for the return?|Is the return free?|Do I pay for the label?",
                "The return is free for you.|We pay for the return if you use our label.",
            ),
            (
                "Can I have another colour instead?|Can I exchange it for a {colour} one?|I would rather have it in "
                "{colour}.",
                "Yes, the {item} is in stock in {colour}. I will send it when yours is back.|Certainly. I have "
                "reserved a {colour} {item} for you.",
            ),
        ),
    ),
    "damaged": Topic(
        (
            (
                "My {item} arrived broken.|The {item} I got is damaged.|There is a scratch on my new {item}.|The "
                "{item} stopped working after {days} days.",
                "I am very sorry about that. Would you like a new {item} or a refund?|I apologise. Shall I send you "
                "another {item}, or give you the money back?",
            ),
            (
                "A new one, please.|Please send me another one.|I would like a replacement.",
                "I have ordered a new {item} for you. It arrives on {day}, and you may keep the old one.|A new {item} "
                "is on its way. You should have it by {day}.",
            ),
        ),
        (
            (
                "Do you need a photo?|Should I send pictures?",
                "Yes, please. Send one photo of the damage to {email}.|A photo would help. You can send it to {email}.",
            ),
        ),
    ),
    "cancel": Topic(
        (
            (
                "I want to cancel my order.|Please cancel order {order}.|I ordered the wrong {item}.|Can I still "
                "cancel the {item}?",
                "I can cancel it if it has not been sent. Is order {order} the right one?|Let me check. Do you mean "
                "order {order}?",
            ),
            (
                "Yes, that one.|Yes, please.|That is right.|Exactly.",
                "Order {order} is cancelled. You get {price} back within {days} days.|Done. I have cancelled order "
                "{order}, and nothing will be charged.",
            ),
        ),
    ),
    "password": Topic(
        (
            (
                "I forgot my password.|I cannot log in.|My password does not work.|How do I reset my password?|I am "
                "locked out of my account.",
                "No problem. Click on Forgot password on the login page. Which e-mail address do you use?|I can send "
                "you a link to set a new password. What is your e-mail address?",
            ),
            (
                "{email}|It is {email}.|I use {email}.",
                "I have sent a link to {email}. It works for {hours} hours.|Please look into {email}. The link there "
                "lets you choose a new password.",
            ),
        ),
        (
            (
                "I did not get the e-mail.|Nothing has come.|There is no e-mail.",
                "Please look in the spam folder. It can take {days} minutes.|I have sent it again. Please check your "
                "spam folder too.",
            ),
        ),
    ),
    "hours": Topic(
        (
            (
                "When are you open?|What are your opening hours?|Are you open on {day}?|When does the shop in {city} "
                "close?|Is the shop in {city} open on {day}?",
                "Our shop in {city} is open from {time} to 8 pm, also on {day}.|We open at {time} and close at 8 pm, "
                "from Monday to Saturday.|On {day} we are open from {time} to 6 pm.",
            ),
        ),
        (
            (
                "Where can I park?|Is there a car park?",
                "There is a car park behind the shop. The first {hours} hours are free.|You can park in front of the "
                "shop for {hours} hours.",
            ),
            (
                "Do you have the {item} there?|Can I see the {item} in the shop?",
                "Yes, the {item} is on display in {city}.|Yes, we have the {item} in {colour} and in black.",
            ),
        ),
    ),
    "invoice": Topic(
        (
            (
                "I need an invoice.|Can you send me the invoice for order {order}?|My invoice is wrong.|There is a "
                "mistake on my bill.",
                "Certainly. To which name should it be made out?|I am sorry. What name should be on the invoice?",
            ),
            (
                "{name}|To {name}, please.|It should say {name}.|My name is {name}.",
                "Thank you, {name}. The invoice over {price} is in your inbox now.|Done. I have sent the invoice for "
                "{name} by e-mail.",
            ),
        ),
        (
            (
                "Is the tax included?|Does it show the tax?",
                "Yes, the tax is shown in a line of its own.|Yes, {price} includes the tax.",
            ),
        ),
    ),
    "warranty": Topic(
        (
            (
                "How long is the warranty on the {item}?|Does the {item} have a warranty?|Is my {item} still under "
                "warranty?|What does the warranty cover?",
                "The {item} has a warranty of {years} years from the day you bought it.|It is {years} years. It covers "
                "faults of the material, but not accidents.",
            ),
        ),
        (
            (
                "Can I extend it?|Can I buy a longer warranty?",
                "Yes, one more year costs {fee}.|You can add two years for {price} within {days} days.",
            ),
            (
                "Who repairs it?|Where is it repaired?",
                "Our workshop in {city} does. It takes about {days} days.|Bring it to the shop in {city}, and we do "
                "the rest.",
            ),
        ),
    ),
    "booking": Topic(
        (
            (
                "I would like to book a table.|Can I reserve a table for {day}?|Do you have a table for {people} on "
                "{day}?|I want to make a reservation.",
                "With pleasure. A table for {people} on {day}, at what time?|Gladly. What time on {day} suits you?",
            ),
            (
                "At {time}.|{time}, please.|Around {time}.|Is {time} possible?",
                "Your table for {people} is booked for {day} at {time}. May I have your name?|{time} on {day} is free. "
                "Which name shall I write down?",
            ),
            (
                "{name}|My name is {name}.|It is {name}.|Please write {name}.",
                "Thank you, {name}. We look forward to seeing you on {day} at {time}.|All set, {name}. See you on "
                "{day}.",
            ),
        ),
        (
            (
                "Do you have vegetarian dishes?|Is there something without meat?",
                "Yes, half of our menu is vegetarian.|Yes, we cook several dishes without meat every day.",
            ),
        ),
    ),
    "payment": Topic(
        (
            (
                "How can I pay?|Which cards do you take?|Can I pay by invoice?|My payment was declined.",
                "You can pay by card, by bank transfer or on delivery. Which do you prefer?|We take all common cards "
                "and bank transfers. What would you like to use?",
            ),
            (
                "By card.|I would like to pay by card.|Card, please.|A bank transfer.",
                "Fine. You will be asked for it at the end of your order.|Very well. We send the {item} as soon as the "
                "{price} are there.",
            ),
        ),
        (
            (
                "Can I pay in parts?|Do you offer instalments?",
                "Yes, in {days} monthly parts without interest.|Yes, for orders over {price}.",
            ),
        ),
    ),
    "stock": Topic(
        (
            (
                "Do you have the {item} in {colour}?|Is the {item} in stock?|When is the {item} available again?|I am "
                "looking for a {colour} {item}.",
                "The {colour} {item} is in stock and costs {price}. Shall I put one aside?|Yes, we have it in {colour} "
                "for {price}. Would you like to order it?",
            ),
            (
                "Yes, please.|That would be nice.|Please do.|Yes, one please.",
                "It waits for you in {city} until {day}.|Done. I have reserved the {colour} {item} for {hours} hours.",
            ),
        ),
    ),
    "account": Topic(
        (
            (
                "I want to change my e-mail address.|How do I change my address?|I have moved to {city}.|Please delete "
                "my account.",
                "You can do that under My account, then Settings. Shall I do it for you?|I can do that for you. Do you "
                "confirm that the account belongs to {name}?",
            ),
            (
                "Yes, please.|Yes, I do.|Please.|Yes, go ahead.",
                "It is done. You will get a confirmation at {email}.|Thank you, {name}. The change is active now.",
            ),
        ),
    ),
}

ENGLISH = Language(
    slots={
        "order": "A-####|B-####|#####|K##-###",
        "item": "lamp|kettle|jacket|phone|camera|bicycle|desk|backpack|printer|headset|watch|blender|tent|chair|radio",
        "colour": "red|blue|green|grey|white|yellow|brown",
        "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday",
        "time": "8 am|9 am|10 am|11 am|noon|1 pm|half past four|6 pm|7 pm",
        "time_of_day": "in the morning|in the afternoon|before noon|in the evening",
        "city": "Leeds|Boston|Dublin|Perth|Austin|Bristol|Toronto|Oxford",
        "price": "## euros|### euros|## dollars|### dollars",
        "fee": "# euros|# dollars|## dollars",
        "name": "Anna Weber|Tom Baker|Li Na|Omar Haddad|Sara Lopez|Ivan Petrov|Grace Kim|Paul Martin|Noor Khan",
        "email": "anna##@example.com|tom.b#@example.org|mail##@example.net|sara#@example.com|info#@example.org",
        "days": "three|five|seven|10|14|20|30",
        "hours": "two|three|24|48",
        "years": "two|three|five",
        "people": "two|three|four|five|six",
    },
    before="||||Hi, |Hello, |Hi there. |Good morning. |Excuse me. |Hey, |Quick question: ",
    after="||||| Thanks.| Please help.| Thank you!",
    greeting=(
        "Hello|Hi|Good morning|Good afternoon|Hi there|Hello, is anyone there?",
        "Hello! How can I help you?|Good day. What can I do for you?|Hello, and welcome. How may I help?",
    ),
    topics=_ENGLISH_TOPICS,
    closing=(
        "Thank you.|Thanks, that is all.|Great, thanks a lot!|Perfect, bye.|Thanks for your help.|That's all.",
        "You are welcome. Have a nice day!|Gladly. Goodbye!|My pleasure. Is there anything else? If not, goodbye.",
    ),
)

_CHINESE_TOPICS = {
    "delivery": Topic(
        (
            ("我的包裹到哪里了？|我的{item}还没到。|订单什么时候到？", "请告诉我订单号。|我来查，订单号是多少？"),
            ("{order}|订单号是{order}。|是{order}。", "订单{order}{day}送到。|已发货，{day}可以收到。"),
        ),
        (("运费多少？|要付运费吗？", "满{price}免运费。|运费{fee}。"),),
    ),
    "refund": Topic(
        (
            (
                "我想退货。|这个{item}可以退吗？|{item}不合适，想退款。",
                "{days}天内可以退。包装还在吗？|可以。商品还没用过吧？",
            ),
            ("在的。|是的。|还没用过。", "请寄回，{days}天内退款{price}。|好的，收到后马上退款。"),
        ),
        (("退货运费谁付？|退货免费吗？", "运费由我们付。|退货免费。"),),
    ),
    "password": Topic(
        (
            ("我忘了密码。|登录不了。|怎么改密码？", "请告诉我您的邮箱。|我给您发链接，邮箱是？"),
            ("{email}|邮箱是{email}。", "链接已发到{email}。|请查收邮件，设置新密码。"),
        ),
    ),
    "hours": Topic(
        (
            (
                "你们几点开门？|{day}营业吗？|{city}店几点关门？",
                "{day}{time}开门，晚上八点关门。|{city}店每天{time}开门。",
            ),
        ),
        (("有停车场吗？|哪里可以停车？", "店后面有停车场。|门口可以停{hours}小时。"),),
    ),
    "invoice": Topic(
        (
            ("我要开发票。|请给我发票。|发票写错了。", "请问抬头写什么？|好的，发票写谁的名字？"),
            ("{name}|写{name}。|抬头是{name}。", "发票已发给{name}。|开好了，金额{price}。"),
        ),
    ),
    "warranty": Topic(
        (("{item}保修多久？|{item}有保修吗？|还在保修期吗？", "{item}保修{years}年。|从购买日起{years}年。"),),
        (("在哪里修？|谁来修？", "{city}店可以修。|送到{city}店，{days}天修好。"),),
    ),
    "booking": Topic(
        (
            ("我想订位子。|{day}有位子吗？|订{people}个人的位子。", "有位子，{day}几点？|好的，请问几点？"),
            ("{time}|{time}可以吗？|大概{time}。", "{day}{time}可以，请问贵姓？|好的，请留个名字。"),
            ("{name}|我叫{name}。", "{name}，{day}见！|订好了，{day}{time}见。"),
        ),
    ),
}

CHINESE = Language(
    slots={
        "order": "A-####|#####",
        "item": "台灯|手机|相机|背包|椅子|耳机|手表|自行车",
        "day": "周一|周二|周三|周四|周五|周六",
        "time": "八点|九点|十点|十一点|下午两点|六点半",
        "city": "北京|上海|广州|成都|杭州",
        "price": "##元|###元",
        "fee": "#元",
        "name": "王芳|李明|张伟|刘洋|陈静",
        "email": "wang##@example.com|li#@example.cn",
        "days": "三|五|七|十",
        "hours": "两|三",
        "years": "两|三|五",
        "people": "两|三|四|六",
    },
    before="|||你好，|您好，|请问，",
    after="||||谢谢。",
    greeting=("你好|您好|在吗？", "您好！有什么可以帮您？|您好，请问需要什么？"),
    topics=_CHINESE_TOPICS,
    closing=("谢谢！|好的，谢谢。|没有了，再见。", "不客气，再见！|祝您愉快！"),
)
